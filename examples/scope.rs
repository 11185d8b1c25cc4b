//! Three tasks run the same block of code under one lock: one after the other.
//!
//!     cargo run --example scope
//!
//! Runs on the embedded store; with `REDIS_URL` set, on that server.

use std::env;
use std::error::Error;
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
    let mut tasks = JoinSet::new();
    for name in ["anna", "ben", "carl"] {
        let locker = locker.clone();
        tasks.spawn(async move {
            let now = || format!("{:>4} ms", start.elapsed().as_millis());
            println!("{}  {name} wants to migrate the database", now());
            // Waits for the lock, runs the block while it is held, releases it. Should the lock be lost, the block is
            // dropped where it stands, and the answer is `Error::Lost`.
            let answer = locker.scope("migrations", async |guard| {
                println!("{}  {name} is inside, fencing token {}", now(), guard.fencing_token().unwrap_or_default());
                sleep(Duration::from_millis(300)).await;
                println!("{}  {name} leaves", now());
                format!("migrated by {name}")
            });
            answer.await
        });
    }
    let answers: Result<Vec<String>, _> = tasks.join_all().await.into_iter().collect();
    println!("{:>4} ms  all are done; the blocks answered {:#?}", start.elapsed().as_millis(), answers?);
    Ok(())
}
