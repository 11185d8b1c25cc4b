//! One of several processes leads, the others know its address, and it steps down when it no longer leads.
//!
//!     cargo run -p tenure-recipes --example leader
//!
//! The lock's metadata is the address, so whoever reads it reads it of the very process that has the lock. The fencing
//! token is the number of the term: it grows with each leader, and a store can refuse those of the terms before.

use std::time::Duration;

use tenure::{Error, Locker};
use tokio::time::sleep;

const KEY: &str = "leader";

/// Waits for its turn and leads; again and again, until `lead` returns of its own accord. `lead` gets the number of the
/// term, and is dropped when the lock is lost, before another process can lead.
async fn stand<F>(locker: &Locker, address: &str, mut lead: impl FnMut(u64) -> F) -> Result<(), Error>
where
    F: Future<Output = ()>,
{
    loop {
        // For as long as the server is away, this waits. The ttl is how long the others wait when a leader's machine
        // dies.
        let guard = locker.lock(KEY).ttl(Duration::from_secs(6)).metadata(address).await?;
        let term = guard.fencing_token().unwrap_or_default();
        match guard.protect(lead(term)).await {
            Ok(()) => return guard.release().await,
            Err(loss) => println!("{address} steps down: {loss}"),
        }
    }
}

/// Returns the address of the process that leads, if one does.
async fn leader(locker: &Locker) -> Result<Option<String>, Error> {
    let holder = locker.inspect(KEY).await?;
    Ok(holder.map(|holder| String::from_utf8_lossy(&holder.metadata).into_owned()))
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let locker = Locker::in_memory(); // or Locker::connect("redis://127.0.0.1:6379").await?
    let candidates = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"].map(|address| {
        let locker = locker.clone();
        tokio::spawn(async move {
            let lead = |term| async move {
                println!("{address} leads, in term {term}");
                sleep(Duration::from_millis(300)).await;
            };
            stand(&locker, address, lead).await
        })
    });
    for _ in 0..3 {
        sleep(Duration::from_millis(200)).await;
        println!("  clients would ask {:?}", leader(&locker).await?);
    }
    for candidate in candidates {
        candidate.await.map_err(|_| Error::Closed)??;
    }
    println!("  clients would ask {:?}", leader(&locker).await?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, Mutex};

    use tenure_test_support::{Server, eventually};
    use tokio::sync::Notify;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_lead_in_turn_one_at_a_time_and_the_address_is_that_of_the_leader() {
        let locker = Locker::in_memory();
        let leading = Arc::new(AtomicU32::new(0));
        let all = ["a", "b", "c"].map(|address| {
            let (locker, leading) = (locker.clone(), leading.clone());
            tokio::spawn(async move {
                let lead = |_| async {
                    assert_eq!(leading.fetch_add(1, Ordering::SeqCst), 0);
                    assert_eq!(leader(&locker).await.unwrap().as_deref(), Some(address));
                    sleep(Duration::from_secs(60)).await;
                    leading.fetch_sub(1, Ordering::SeqCst);
                };
                stand(&locker, address, lead).await.unwrap();
            })
        });
        for candidate in all {
            candidate.await.unwrap();
        }
        assert_eq!(leader(&locker).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_leader_that_loses_the_lock_steps_down_and_the_next_term_is_greater() {
        let server = Server::start();
        let locker = Locker::connect(&server.url()).await.unwrap();
        let (terms, leads) = (Mutex::new(Vec::new()), Notify::new());
        let is_first = |term| {
            let mut terms = terms.lock().unwrap();
            terms.push(term);
            terms.len() == 1
        };
        let (is_first, leads) = (&is_first, &leads);
        let lead = |term| async move {
            // The second term ends of its own accord, the first only by its loss.
            if is_first(term) {
                leads.notify_one();
                std::future::pending::<()>().await;
            }
        };
        let deletes = async {
            leads.notified().await;
            assert_eq!(leader(&locker).await.unwrap().as_deref(), Some("here"));
            server.cli(&["DEL", KEY]);
        };
        let (stood, ()) = tokio::join!(stand(&locker, "here", lead), deletes);
        stood.unwrap();
        let terms = terms.lock().unwrap().clone();
        assert!(terms.len() == 2 && terms[0] < terms[1], "{terms:?}");
        eventually("nobody leads", async || leader(&locker).await.unwrap().is_none().then_some(())).await;
    }
}
