//! `fenced_write.rs` with PostgreSQL: a late write of a holder that has lost its lock is refused by the database.
//!
//!     DATABASE_URL="host=localhost user=postgres" cargo run -p tenure-recipes --example fenced_write_postgresql

use std::env;
use std::error::Error;
use std::time::Duration;

use tenure::{LockGuard, Locker};
use tokio_postgres::{Client, NoTls};

// Only this connection sees it.
const TABLE: &str =
    "CREATE TEMPORARY TABLE accounts (id BIGINT PRIMARY KEY, balance BIGINT NOT NULL, fence BIGINT NOT NULL)";

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

async fn write(database: &Client, account: i64, balance: i64, fence: i64) -> Result<Written, tokio_postgres::Error> {
    match database.execute(WRITE, &[&account, &balance, &fence]).await? {
        0 => Ok(Written::Stale),
        _ => Ok(Written::Yes),
    }
}

/// Returns the fencing token as databases have numbers. It is below 2^53.
fn fence(guard: &LockGuard) -> i64 {
    guard.fencing_token().and_then(|token| i64::try_from(token).ok()).unwrap_or_default()
}

/// Connects. The connection is driven by a task of its own until the client is dropped.
async fn connect(config: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(config, NoTls).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            eprintln!("the connection to the database ended: {error}");
        }
    });
    Ok(client)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let database = connect(&env::var("DATABASE_URL").map_err(|_| "DATABASE_URL is not set")?).await?;
    database.batch_execute(TABLE).await?;
    let locker = Locker::in_memory(); // or Locker::connect("redis://127.0.0.1:6379").await?

    // A holder that stands still, as its lock isn't renewed.
    let slow = locker.lock("account:1").ttl(Duration::from_millis(200)).no_renewal().await?;
    let slow_fence = fence(&slow);
    // The next one waits until the ttl of the first has ended.
    let next = locker.lock("account:1").await?;
    println!("the next holder writes 250: {:?}", write(&database, 1, 250, fence(&next)).await?);
    // The first goes on where it stood, and hasn't looked.
    println!("the first one writes 100:   {:?}", write(&database, 1, 100, slow_fence).await?);
    next.release().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, Output, Stdio};

    use super::*;

    /// A PostgreSQL server on a Unix socket, which ends with the test.
    struct Server {
        process: Child,
        dir: tempfile::TempDir,
    }

    impl Server {
        fn start() -> Self {
            let dir = tempfile::tempdir().unwrap();
            // PostgreSQL refuses to run as root.
            run(Command::new("chmod").arg("777").arg(dir.path()));
            let data = dir.path().join("data");
            let authenticate = ["--auth", "trust", "--username", "postgres", "--no-sync", "--pgdata"];
            run(command("initdb").args(authenticate).arg(&data));
            let process = command("postgres")
                .args(["-c", "listen_addresses=", "-c", "fsync=off", "-k"])
                .arg(dir.path())
                .arg("-D")
                .arg(&data)
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            Self { process, dir }
        }

        async fn connect(&self) -> Client {
            let config = format!("host={} user=postgres", self.dir.path().display());
            tenure_test_support::eventually("PostgreSQL accepts connections", || async { connect(&config).await.ok() })
                .await
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            // It waits for all processes of the server, which write to the directory. What has ended already is as
            // well.
            drop(command("pg_ctl").args(["stop", "-m", "immediate", "-D"]).arg(self.dir.path().join("data")).output());
            drop(self.process.kill());
            drop(self.process.wait());
        }
    }

    fn run(command: &mut Command) -> Output {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    /// A program of PostgreSQL. Debian has several versions beside each other, and none in the path.
    fn command(program: &str) -> Command {
        let is_root = run(Command::new("id").arg("-u")).stdout == b"0\n";
        let path = installed(program).unwrap_or_else(|| program.into());
        if !is_root {
            return Command::new(path);
        }
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(path);
        command
    }

    fn installed(program: &str) -> Option<PathBuf> {
        let versions = Path::new("/usr/lib/postgresql").read_dir().ok()?;
        versions.flatten().map(|version| version.path().join("bin").join(program)).find(|path| path.exists())
    }

    #[tokio::test]
    async fn a_late_writer_is_refused_and_a_holder_may_write_as_often_as_it_wants() {
        let server = Server::start();
        let database = server.connect().await;
        database.batch_execute(TABLE).await.unwrap();
        let locker = Locker::in_memory();
        let first = locker.lock("account:1").ttl(Duration::from_millis(50)).no_renewal().await.unwrap();
        let late = fence(&first);
        assert_eq!(write(&database, 1, 100, late).await.unwrap(), Written::Yes);
        assert_eq!(write(&database, 1, 110, late).await.unwrap(), Written::Yes);
        let second = locker.lock("account:1").await.unwrap();
        assert_eq!(write(&database, 1, 250, fence(&second)).await.unwrap(), Written::Yes);
        assert_eq!(write(&database, 1, 120, late).await.unwrap(), Written::Stale);
        let row = database.query_one("SELECT balance FROM accounts WHERE id = 1", &[]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), 250);
    }
}
