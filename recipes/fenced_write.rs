//! A database that refuses what a holder writes after its lock has become another's.
//!
//!     cargo run -p tenure-recipes --example fenced_write
//!
//! A process can stand still between its last look at the lock and a write that it sends: then the write arrives late,
//! and no lock can prevent that. So each row remembers the greatest fencing token that has written it, and is not
//! changed by a smaller one. This is SQLite; `fenced_write_postgresql.rs` does the same with PostgreSQL.

use std::time::Duration;

use rusqlite::{Connection, params};
use tenure::{LockGuard, Locker};

const TABLE: &str = "CREATE TABLE accounts (id BIGINT PRIMARY KEY, balance BIGINT NOT NULL, fence BIGINT NOT NULL)";

/// Inserts a row, or changes one that has no greater token.
const WRITE: &str = "
    INSERT INTO accounts (id, balance, fence) VALUES ($1, $2, $3)
    ON CONFLICT (id) DO UPDATE SET balance = excluded.balance, fence = excluded.fence
    WHERE accounts.fence <= excluded.fence";

/// What a write came to.
#[derive(Debug, PartialEq, Eq)]
enum Written {
    Yes,
    /// There was a newer holder: this one has to stop.
    Stale,
}

fn write(database: &Connection, account: i64, balance: i64, fence: i64) -> rusqlite::Result<Written> {
    match database.execute(WRITE, params![account, balance, fence])? {
        0 => Ok(Written::Stale),
        _ => Ok(Written::Yes),
    }
}

/// Returns the fencing token as databases have numbers. It is below 2^53.
fn fence(guard: &LockGuard) -> i64 {
    guard.fencing_token().and_then(|token| i64::try_from(token).ok()).unwrap_or_default()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let database = Connection::open_in_memory()?;
    database.execute(TABLE, [])?;
    let locker = Locker::in_memory(); // or Locker::connect("redis://127.0.0.1:6379").await?

    // A holder that stands still, as its lock isn't renewed.
    let slow = locker.lock("account:1").ttl(Duration::from_millis(200)).no_renewal().await?;
    let slow_fence = fence(&slow);
    // The next one waits until the ttl of the first has ended.
    let next = locker.lock("account:1").await?;
    println!("the next holder writes 250: {:?}", write(&database, 1, 250, fence(&next))?);
    // The first goes on where it stood, and hasn't looked.
    println!("the first one writes 100:   {:?}", write(&database, 1, 100, slow_fence)?);
    println!("and sees, if it looks:      {:?}", slow.check());
    next.release().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_late_writer_is_refused_and_a_holder_may_write_as_often_as_it_wants() {
        let database = Connection::open_in_memory().unwrap();
        database.execute(TABLE, []).unwrap();
        let balance = || database.query_row("SELECT balance FROM accounts WHERE id = 1", [], |row| row.get(0));
        let locker = Locker::in_memory();
        let first = locker.lock("account:1").ttl(Duration::from_secs(5)).no_renewal().await.unwrap();
        let late = fence(&first);
        assert_eq!(write(&database, 1, 100, late).unwrap(), Written::Yes);
        assert_eq!(write(&database, 1, 110, late).unwrap(), Written::Yes);
        let second = locker.lock("account:1").await.unwrap();
        assert_eq!(write(&database, 1, 250, fence(&second)).unwrap(), Written::Yes);
        assert_eq!(write(&database, 1, 120, late).unwrap(), Written::Stale);
        assert_eq!(balance(), Ok(250));
        // A row that only the late one wants to write: nobody newer has, so it may.
        assert_eq!(write(&database, 2, 5, late).unwrap(), Written::Yes);
    }
}
