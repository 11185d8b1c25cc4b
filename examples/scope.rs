//! Three tasks run the same block of code under one lock: one after the other, never two at once.
//!
//!     cargo run --example scope
//!
//! Runs on the embedded store; with `REDIS_URL` set, on that server.

use std::env;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tenure::Locker;
use tokio::task::JoinSet;
use tokio::time::sleep;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let locker = match env::var("REDIS_URL") {
        Ok(url) => {
            println!("The lock is kept on the server that REDIS_URL names.\n");
            Locker::connect(&url).await?
        }
        Err(_) => {
            println!("REDIS_URL is not set: the lock is kept on the embedded store, in this process.\n");
            Locker::in_memory()
        }
    };
    let start = Instant::now();
    let now = move || format!("{:>4} ms", start.elapsed().as_millis());
    let inside = Arc::new(AtomicU32::new(0));

    println!("{}  three tasks want to migrate the database", now());
    let mut tasks = JoinSet::new();
    for _ in 0..3 {
        let (locker, inside) = (locker.clone(), inside.clone());
        tasks.spawn(async move {
            // Waits for the lock, runs the block while it is held, and releases it. If the lock is lost, the block is
            // dropped where it is, and `scope` returns `Error::Lost`.
            let answer = locker.scope("migrations", async |guard| {
                let count = inside.fetch_add(1, Ordering::SeqCst) + 1;
                let fence = guard.fencing_token().unwrap_or_default();
                println!("{}  a task enters, fencing token {fence}; inside now: {count}", now());
                sleep(Duration::from_millis(300)).await;
                println!("{}  it leaves", now());
                inside.fetch_sub(1, Ordering::SeqCst);
                count
            });
            answer.await
        });
    }

    // `scope` returns what the block returns.
    let mut most = 0;
    while let Some(count) = tasks.join_next().await {
        most = most.max(count??);
    }
    println!("{}  all are done; most inside at once: {most}", now());
    Ok(())
}
