//! A guide from the first lock to the end of a program: what you need to know, in order.
//!
//! # A lock
//!
//! A [`Locker`] is a connection to the server that keeps the locks. Create one at start-up, and clone it: clones share
//! the connection. A lock has a key, which is any text or bytes, and lives at the server under exactly that name.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! use tenure::Locker;
//!
//! # let locker = Locker::in_memory();
//! # if false {
//! let locker = Locker::connect("redis://127.0.0.1:6379").await?;
//! # }
//! let guard = locker.lock("invoices:42").await?;
//! // Nobody else has `invoices:42` now: no other task, no other process, no other machine.
//! guard.release().await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`lock`](crate::Locker::lock) waits for its turn. [`try_lock`](crate::Locker::try_lock) doesn't wait:
//! [`Error::NotObtained`](crate::Error::NotObtained) says that another has the lock, which is often all you want to
//! know. Between the two are [`wait_at_most`](crate::LockRequest::wait_at_most), and
//! [`obtain`](crate::Locker::obtain) with a [`Retry`](crate::Retry).
//!
//! # A guard's life
//!
#![doc = include_str!("guard.svg")]
//!
//! The server keeps a lock for its *ttl*, 30 s unless you [choose another](crate::LockRequest::ttl). So the lock of a
//! process that dies is free again within that time. A guard *renews* its lock long before: every third of the ttl, the
//! server is asked to keep the lock for a whole ttl from then on.
//!
//! The guard counts on a lock only until its *deadline*: the ttl after the last renewal that the server has confirmed,
//! counted from the moment before that renewal was sent, less a little for clocks that differ. So the guard gives up
//! first, and the server frees the lock after that, even if every packet in between was lost.
//!
//! # When it is lost
//!
//! A lock on a network can always be lost: the cable is cut, the server restarts without its memory, somebody deletes
//! the key. Then another may have it soon, and your work must stop. There are four ways to do that. Use the first that
//! fits:
//!
//! ```
//! # async fn step(_: u32) {}
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # let locker = tenure::Locker::in_memory();
//! let guard = locker.lock("index").await?;
//!
//! // 1. Work that may be dropped at any await.
//! guard.protect(async { step(1).await }).await?;
//!
//! // 2. The same, beside other things that can happen.
//! tokio::select! {
//!     loss = guard.lost() => return Err(loss.into()),
//!     () = step(2) => {}
//! }
//!
//! // 3. Work in steps that must not be dropped: look between them.
//! for i in 3..6 {
//!     guard.check()?;
//!     step(i).await;
//! }
//!
//! // 4. Work elsewhere, which takes a `CancellationToken`.
//! let stop = guard.cancellation_token();
//! let work = tokio::spawn(async move { stop.run_until_cancelled(step(6)).await });
//! # work.await.unwrap();
//! # guard.release().await
//! # }
//! ```
//!
//! [`scope`](crate::Locker::scope) does the whole of it for one block: it waits for the lock, drops the block if the
//! lock is lost, and releases the lock before it returns.
//!
//! # What no lock can do
//!
//! A process can stand still between its last look at the guard and the write that it then sends: a page fault, a
//! snapshot of the virtual machine, a slow packet. When it arrives, the lock may be another's. No lock can prevent
//! that, but the store that is written to can. Each holder has a [*fencing token*](crate::LockGuard::fencing_token),
//! greater than those of all holders before it. Send it along, and let the store refuse a write whose token is smaller
//! than one that it has seen:
//!
//! ```sql
//! UPDATE accounts SET balance = :balance, fence = :fence WHERE id = :id AND fence <= :fence
//! -- No row was updated: there is a newer holder. Stop.
//! ```
//!
//! The recipes [`fenced_write.rs`] and [`fenced_write_postgresql.rs`] are programs that do this with SQLite and with
//! PostgreSQL.
//!
//! # How long a ttl
//!
//! The ttl is how long others wait after a holder's machine has died, and also how long the server may be away without
//! costing you the lock. It has nothing to do with how long the work takes, as a guard renews its lock for as long as
//! it lives. Stay with 30 s unless you know better; 10 s is fine on a good network, and less than 2 s only on one
//! machine.
//!
//! # Waiting
//!
//! Waiters are notified when a lock is released, and served in turn. In a process, that is the order of their arrival;
//! between processes, each has its turn. [`fair`](crate::LockRequest::fair) makes it the order of arrival everywhere. A
//! future that waits for a lock may be dropped at any moment, and leaves nothing behind.
//!
//! A guard is not reentrant. A task that asks for a lock that it holds already waits for itself: pass the guard on
//! instead, by reference.
//!
//! # Synchronous code
//!
//! There is no blocking interface. Code that is not async has a runtime of its own and calls its `block_on`. The
//! runtime has a worker thread, on which locks are renewed while nobody is in `block_on`:
//!
//! ```
//! # use tenure::Locker;
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
//! # let locker = Locker::in_memory();
//! # if false {
//! let locker = runtime.block_on(Locker::connect("redis://127.0.0.1:6379"))?;
//! # }
//! let guard = runtime.block_on(async { locker.lock("invoices:42").await })?;
//! guard.check()?; // between the steps of the work
//! runtime.block_on(guard.release())?;
//! # Ok(())
//! # }
//! ```
//!
//! # More than one
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # let locker = tenure::Locker::in_memory();
//! // All or none, in whatever order the keys come: two such requests can't wait for each other.
//! let both = locker.lock_all(["account:1", "account:2"]).await?;
//! both.release().await
//! # }
//! ```
//!
//! A service that holds a changing set of locks, such as the shards that it serves, gives their guards to a
//! [`WatchDog`](crate::WatchDog), which keeps them by key and reports what happens to each.
//!
//! # Scheduled jobs
//!
//! "Every machine of the fleet starts this on the hour, and one of them should run it" needs a little more than a lock:
//! the job may take a second, and the clocks of the machines differ by more. With
//! [`hold_at_least`](crate::LockRequest::hold_at_least) the key stays taken after the release, so a machine that comes
//! late finds that it has come too late. The recipe [`once_per_period.rs`] is such a job.
//!
//! For a job that might hang and keep its lock for ever, set [`hold_at_most`](crate::LockRequest::hold_at_most).
//!
//! # Errors, and what to do about them
//!
//! | error | what it means | what to do |
//! | --- | --- | --- |
//! | [`NotObtained`](crate::Error::NotObtained) | another has the lock | what your job does then: skip, or come back |
//! | [`Redis`](crate::Error::Redis), [`Quorum`](crate::Error::Quorum) | the server refused, failed or could not be reached; the request may have run | leave the clean-up to the locker; retry if [`is_transient`](crate::Error::is_transient) |
//! | [`Lost`](crate::Error::Lost) | the work was stopped, as the lock had ended | what you do when work fails half-way |
//! | [`NotHeld`](crate::Error::NotHeld) | the lock had ended before the call | the same |
//! | [`ValidityExpired`](crate::Error::ValidityExpired) | the server replied so late that the lock was of no use | a longer ttl, or a closer server |
//! | [`Closed`](crate::Error::Closed) | the program is ending | end |
//!
//! Only `NotObtained` means that somebody else has the lock, and it always rests on a reply of the server.
//!
//! # The end of a program
//!
//! A guard that is dropped releases its lock in the background, which needs a runtime that still runs. At the end of
//! `main` there is none, and the key stays until its ttl ends. So end like this:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # use std::time::Duration;
//! # let locker = tenure::Locker::in_memory();
//! let left = locker.close_within(Duration::from_secs(5)).await;
//! if left > 0 {
//!     eprintln!("{left} locks could not be released in time; their ttl frees them");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Tests of your own code
//!
//! Code that takes a `&Locker` runs on [`Locker::in_memory`](crate::Locker::in_memory) in its tests: same rules, no
//! server. It keeps to tokio's clock, so under `#[tokio::test(start_paused = true)]` an hour passes in a millisecond,
//! and a loss comes at exactly its time. The recipe [`own_tests.rs`] shows that, and a locker that many tests share.
//!
//! [`Locker`]: crate::Locker
//! [`fenced_write.rs`]: https://github.com/tenure-rs/tenure/blob/main/recipes/fenced_write.rs
//! [`fenced_write_postgresql.rs`]: https://github.com/tenure-rs/tenure/blob/main/recipes/fenced_write_postgresql.rs
//! [`once_per_period.rs`]: https://github.com/tenure-rs/tenure/blob/main/recipes/once_per_period.rs
//! [`own_tests.rs`]: https://github.com/tenure-rs/tenure/blob/main/recipes/own_tests.rs
