//! Many instances of a service start at once, and one of them brings the database up to date while the others wait.
//!
//!     cargo run -p tenure-recipes --example migrations

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;
use tenure::Locker;

/// In their order. Never change one that has been released.
const MIGRATIONS: [&str; 3] = [
    "CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT NOT NULL)",
    "ALTER TABLE customers ADD COLUMN email TEXT",
    "CREATE UNIQUE INDEX by_email ON customers (email)",
];

/// Brings the database up to date. Returns how many migrations were left for this instance to run.
async fn migrate(locker: &Locker, path: &Path) -> Result<usize, Box<dyn Error + Send + Sync>> {
    // An instance that waits for longer gives up and is started anew by its supervisor.
    let guard = locker.lock("migrations").wait_at_most(Duration::from_secs(60)).await?;
    let mut ran = 0;
    loop {
        // A migration must not be dropped half-way, so the lock is checked before each. What the check can't prevent,
        // the database does: a migration and the number of the next one are one transaction.
        guard.check()?;
        let path = path.to_owned();
        // SQLite blocks its thread.
        match tokio::task::spawn_blocking(move || run_next(&path)).await?? {
            true => ran += 1,
            false => break,
        }
    }
    guard.release().await?;
    Ok(ran)
}

/// Runs the next migration. Returns whether there was one.
fn run_next(path: &Path) -> rusqlite::Result<bool> {
    let mut database = Connection::open(path)?;
    let transaction = database.transaction()?;
    let version: usize = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let Some(migration) = MIGRATIONS.get(version) else { return Ok(false) };
    transaction.execute_batch(migration)?;
    transaction.pragma_update(None, "user_version", version + 1)?;
    transaction.commit()?;
    Ok(true)
}

/// Starts several instances at once. Returns how many migrations each of them ran.
async fn start(instances: usize, path: &Path) -> Result<Vec<usize>, Box<dyn Error + Send + Sync>> {
    let locker = Locker::in_memory(); // or Locker::connect("redis://127.0.0.1:6379").await?
    let each = (0..instances).map(|_| {
        let (locker, path) = (locker.clone(), path.to_owned());
        tokio::spawn(async move { migrate(&locker, &path).await })
    });
    let mut ran = Vec::new();
    for instance in each.collect::<Vec<_>>() {
        ran.push(instance.await??);
    }
    Ok(ran)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let folder = tempfile::tempdir()?;
    let ran = start(5, &folder.path().join("shop.db")).await?;
    println!("migrations run by each instance: {ran:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_migration_runs_once_whoever_runs_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shop.db");
        assert_eq!(start(8, &path).await.unwrap().iter().sum::<usize>(), MIGRATIONS.len());
        assert_eq!(start(8, &path).await.unwrap().iter().sum::<usize>(), 0);
        let columns = "SELECT count(*) FROM pragma_table_info('customers')";
        let columns: u32 = Connection::open(&path).unwrap().query_row(columns, [], |row| row.get(0)).unwrap();
        assert_eq!(columns, 3);
    }
}
