//! Two workers want one lock: one has it, the other waits for its turn.
//!
//!     cargo run --example quickstart
//!
//! Runs on the embedded store; with `REDIS_URL` set, on that server.

use std::env;
use std::error::Error;
use std::time::{Duration, Instant};

use tenure::{Error as LockError, Locker};
use tokio::time::sleep;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let locker = match env::var("REDIS_URL") {
        Ok(url) => {
            println!("Locks are kept on the server that REDIS_URL names.\n");
            Locker::connect(&url).await?
        }
        Err(_) => {
            println!("REDIS_URL is not set: locks are kept on the embedded store, in this process.\n");
            Locker::in_memory()
        }
    };
    let start = Instant::now();
    let now = move || format!("{:>4} ms", start.elapsed().as_millis());

    // Anna has the lock. The guard renews it in the background for as long as it lives.
    let guard = locker.lock("invoices:42").await?;
    let (key, remaining) = (guard.key(), guard.remaining().as_millis());
    println!("{}  anna has `{key}`, surely for {remaining} ms more even if it were never renewed", now());
    println!("{}  anna's fencing token is {}", now(), guard.fencing_token().unwrap_or_default());

    // `try_lock` doesn't wait: it fails at once if another holds the lock.
    match locker.try_lock("invoices:42").await {
        Err(LockError::NotObtained { key, .. }) => println!("{}  carl tries once: `{key}` is held by another", now()),
        other => drop(other?),
    }

    // Ben waits for his turn in a separate task.
    let ben = tokio::spawn({
        let locker = locker.clone();
        async move {
            println!("{}  ben waits for it", now());
            let guard = locker.lock("invoices:42").wait_at_most(Duration::from_secs(10)).await?;
            let fence = guard.fencing_token().unwrap_or_default();
            println!("{}  ben has it; his fencing token is greater: {fence}", now());
            // The guard is dropped here, and the lock is released in the background.
            Ok::<_, LockError>(())
        }
    });

    // Anna's work, which is dropped if the lock is lost meanwhile.
    let sum = guard.protect(async {
        sleep(Duration::from_millis(500)).await;
        40 + 2
    });
    let sum = sum.await?;
    println!("{}  anna has worked under the lock: {sum}; she releases it", now());
    guard.release().await?;

    ben.await??;
    // Waits for the release of dropped guards.
    locker.close().await;
    println!("{}  all locks are released", now());
    Ok(())
}
