//! A lock is lost while work is under way, and the work stops before anybody else can start.
//!
//!     cargo run --example lost_in_select
//!
//! On the embedded store the lock is lost because nobody renews it and its ttl ends. With `REDIS_URL` set, a second
//! lock is lost because somebody deletes its key on that server.

use std::env;
use std::error::Error;
use std::time::{Duration, Instant};

use tenure::fred::prelude::{Builder, ClientLike, Config, FredResult};
use tenure::fred::types::{ClusterHash, CustomCommand, Value};
use tenure::{LockGuard, Locker, Loss};
use tokio::time::sleep;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let Ok(url) = env::var("REDIS_URL") else {
        println!("REDIS_URL is not set: the lock is kept on the embedded store, in this process.\n");
        return expired(&Locker::in_memory()).await;
    };
    println!("The lock is kept on the server that REDIS_URL names.\n");
    let locker = Locker::connect(&url).await?;
    expired(&locker).await?;
    deleted(&locker, &url).await
}

/// Holds a lock without renewal, like a process that is cut off from the server.
async fn expired(locker: &Locker) -> Result<(), Box<dyn Error>> {
    println!("A lock with a ttl of 1.5 s that nobody renews:");
    let guard = locker.lock("index:products").ttl(Duration::from_millis(1_500)).no_renewal().await?;
    let loss = rebuild_index(&guard).await;
    if let Err(error) = guard.release().await {
        println!("           release() returned: {error}");
    }
    assert_eq!(loss, Some(Loss::Expired));
    Ok(())
}

/// Holds a lock with renewal: the next renewal finds the key gone.
async fn deleted(locker: &Locker, url: &str) -> Result<(), Box<dyn Error>> {
    println!("\nA lock that is renewed every 500 ms, whose key somebody deletes:");
    let guard = locker.lock("index:products").renew_every(Duration::from_millis(500)).await?;
    let vandal = tokio::spawn(delete("index:products", url.to_owned(), Duration::from_millis(600)));
    let loss = rebuild_index(&guard).await;
    vandal.await??;
    assert_eq!(loss, Some(Loss::Missing));
    Ok(())
}

/// Works step by step until it is done, or the lock is lost. Returns the loss.
async fn rebuild_index(guard: &LockGuard) -> Option<Loss> {
    let start = Instant::now();
    let now = || format!("  {:>4} ms", start.elapsed().as_millis());
    let work = async {
        for step in 1..=10 {
            println!("{}  step {step} of 10; surely held for {} ms more", now(), guard.remaining().as_millis());
            sleep(Duration::from_millis(400)).await;
        }
    };
    tokio::select! {
        () = work => {
            println!("{}  done", now());
            None
        }
        loss = guard.lost() => {
            println!("{}  stopped: {loss}; is_held() is {}", now(), guard.is_held());
            Some(loss)
        }
    }
}

async fn delete(key: &'static str, url: String, after: Duration) -> FredResult<()> {
    let client = Builder::from_config(Config::from_url(&url)?).build()?;
    client.init().await?;
    sleep(after).await;
    let command = CustomCommand::new_static("DEL", ClusterHash::FirstKey, false);
    let _deleted: Value = client.custom(command, vec![key]).await?;
    println!("           somebody deletes the key; the next renewal will notice");
    client.quit().await
}
