//! Readers share a price list that a writer changes now and then: readers at the same time, the writer alone.
//!
//!     cargo run --example reader_writer
//!
//! The writer gets in although the readers never stop, as those that come later wait behind it. After the change it
//! goes on as a reader, and nobody else can write in between. Runs on the embedded store; with `REDIS_URL` set, on that
//! server.

use std::env;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tenure::Locker;
use tokio::task::JoinSet;
use tokio::time::sleep;

const KEY: &str = "prices";
const READERS: u32 = 4;

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
    let (version, inside) = (Arc::new(AtomicU32::new(1)), Arc::new(AtomicU32::new(0)));

    // Each reads for 100 ms, and then again: at no time is the key free.
    let mut readers = JoinSet::new();
    for number in 1..=READERS {
        let (locker, version, inside) = (locker.clone(), version.clone(), inside.clone());
        readers.spawn(async move {
            let mut most = 0;
            for _ in 0..5 {
                let guard = locker.read(KEY).await?;
                most = most.max(inside.fetch_add(1, Ordering::SeqCst) + 1);
                println!("{}  reader {number} reads version {}", now(), version.load(Ordering::SeqCst));
                sleep(Duration::from_millis(u64::from(80 + 10 * number))).await;
                inside.fetch_sub(1, Ordering::SeqCst);
                guard.release().await?;
            }
            Ok::<u32, tenure::Error>(most)
        });
    }

    sleep(Duration::from_millis(150)).await;
    println!("{}  the writer wants to write; readers inside: {}", now(), inside.load(Ordering::SeqCst));
    let writer = locker.lock(KEY).await?;
    println!("{}  it writes; readers inside: {}", now(), inside.load(Ordering::SeqCst));
    sleep(Duration::from_millis(100)).await;
    version.fetch_add(1, Ordering::SeqCst);
    // In one step: nobody can have changed what it goes on to read.
    let reader = writer.downgrade().await?;
    println!("{}  it has written, and goes on as a reader", now());
    sleep(Duration::from_millis(100)).await;
    println!("{}  the key is held by {} readers", now(), locker.holders(KEY).await?.len());
    reader.release().await?;

    let mut most = 0;
    while let Some(read) = readers.join_next().await {
        most = most.max(read??);
    }
    println!("{}  all are done; most readers inside at once: {most}", now());
    Ok(())
}
