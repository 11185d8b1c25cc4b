//! A server for your own tests: what your code does when the server is away, when a lock is lost, when another has it.
//!
//! [`EmbeddedServer`] is the embedded store of [`Locker::in_memory`](crate::Locker::in_memory) with a handle on it.
//! Each [locker](crate::LockerBuilder::in_memory_with) on it is like a process of its own. Everything happens on
//! tokio's clock, so a test under `tokio::time::pause` takes no time, whatever the ttls are.
//!
//! # Examples
//!
//! A job that has to stop when its lock is lost:
//!
//! ```
//! use std::time::Duration;
//! use tenure::testing::EmbeddedServer;
//! use tenure::{Error, Locker, Loss};
//!
//! /// The code under test.
//! async fn import(locker: &Locker) -> Result<(), Error> {
//!     locker.scope("import", async |_| tokio::time::sleep(Duration::from_secs(600)).await).await
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Error> {
//! let server = EmbeddedServer::new();
//! let locker = Locker::builder().in_memory_with(&server);
//!
//! // It ends well.
//! import(&locker).await?;
//!
//! // The server stays away for longer than the ttl.
//! let job = tokio::spawn({
//!     let locker = locker.clone();
//!     async move { import(&locker).await }
//! });
//! tokio::time::sleep(Duration::from_secs(60)).await;
//! server.go_away();
//! assert!(matches!(job.await.unwrap(), Err(Error::Lost(Loss::Expired))));
//! server.come_back();
//!
//! // Another process has the lock.
//! let other = Locker::builder().in_memory_with(&server);
//! let held = other.lock("import").await?;
//! assert!(matches!(locker.try_lock("import").await, Err(Error::NotObtained { .. })));
//! # held.release().await
//! # }
//! ```

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::store::Holder;
use crate::store::embedded::Embedded;
use crate::{Key, Token};

/// A server in this process, for tests of code that uses locks.
///
/// Cheap to clone: all clones are the same server.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), tenure::Error> {
/// use tenure::testing::EmbeddedServer;
/// use tenure::{Locker, Loss};
///
/// let server = EmbeddedServer::new();
/// let locker = Locker::builder().in_memory_with(&server);
/// let guard = locker.lock("k").await?;
/// server.lose("k");
/// assert_eq!(guard.lost().await, Loss::Missing); // by its next renewal
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Default)]
pub struct EmbeddedServer {
    embedded: Arc<Embedded>,
}

impl EmbeddedServer {
    /// Starts a server without any locks.
    ///
    /// ```
    /// let server = tenure::testing::EmbeddedServer::new();
    /// ```
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the server away: from now on it neither runs anything nor replies, like one behind a network that drops
    /// everything. Its clock goes on, so locks expire.
    ///
    /// Each operation waits for it to [come back](Self::come_back), up to the [command
    /// timeout](crate::LockerBuilder::command_timeout), and then fails with a timeout.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    /// use tenure::testing::EmbeddedServer;
    /// use tenure::{Locker, Loss};
    ///
    /// let server = EmbeddedServer::new();
    /// let locker = Locker::builder().in_memory_with(&server);
    /// let guard = locker.lock("k").ttl(Duration::from_secs(30)).await?;
    /// server.go_away();
    /// assert!(locker.try_lock("other").await.unwrap_err().is_transient());
    /// assert_eq!(guard.lost().await, Loss::Expired);
    /// # Ok(())
    /// # }
    /// ```
    pub fn go_away(&self) {
        self.embedded.set_away(true);
    }

    /// Brings the server back, with all locks that have not expired meanwhile. Operations that wait for it run.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    /// use tenure::Locker;
    /// use tenure::testing::EmbeddedServer;
    ///
    /// let server = EmbeddedServer::new();
    /// let locker = Locker::builder().in_memory_with(&server);
    /// let guard = locker.lock("k").ttl(Duration::from_secs(30)).await?;
    /// server.go_away();
    /// tokio::time::sleep(Duration::from_secs(20)).await;
    /// server.come_back();
    /// tokio::time::sleep(Duration::from_secs(60)).await;
    /// assert!(guard.is_held());
    /// # Ok(())
    /// # }
    /// ```
    pub fn come_back(&self) {
        self.embedded.set_away(false);
    }

    /// Loses a key, as by an eviction or a `DEL` by hand. Nobody is notified. Returns whether it was there.
    ///
    /// Its holder finds that out at its next renewal, and reports [`Loss::Missing`](crate::Loss::Missing); or
    /// [`Loss::Taken`](crate::Loss::Taken) if another has obtained the lock by then.
    ///
    /// ```
    /// let server = tenure::testing::EmbeddedServer::new();
    /// assert!(!server.lose("k"));
    /// ```
    pub fn lose(&self, key: impl Into<Key>) -> bool {
        self.embedded.store.delete(&key.into())
    }

    /// Loses all keys, as by a restart without persistence. Fencing tokens go on growing, as they do then.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use tenure::testing::EmbeddedServer;
    ///
    /// let server = EmbeddedServer::new();
    /// let locker = tenure::Locker::builder().in_memory_with(&server);
    /// let guard = locker.lock("k").await?;
    /// server.lose_all();
    /// let second = locker.lock("k").await?;
    /// assert!(second.fencing_token() > guard.fencing_token());
    /// assert_eq!(guard.lost().await, tenure::Loss::Taken);
    /// # Ok(())
    /// # }
    /// ```
    pub fn lose_all(&self) {
        self.embedded.store.forget();
    }

    /// Gives the lock of a key to this token, for this ttl, whoever holds it, as after a failover that forgot the
    /// holder.
    ///
    /// Its holder finds that out at its next renewal, and reports [`Loss::Taken`](crate::Loss::Taken). The ttl counts
    /// from now, in whole milliseconds; one of zero ends at once.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    /// use tenure::testing::EmbeddedServer;
    /// use tenure::{Locker, Loss, Token};
    ///
    /// let server = EmbeddedServer::new();
    /// let locker = Locker::builder().in_memory_with(&server);
    /// let guard = locker.lock("k").await?;
    /// server.give("k", Token::random(), Duration::from_secs(60));
    /// assert_eq!(guard.lost().await, Loss::Taken);
    /// # Ok(())
    /// # }
    /// ```
    pub fn give(&self, key: impl Into<Key>, token: Token, ttl: Duration) {
        self.embedded.store.give(&key.into(), token, ttl);
    }

    /// Returns the holder of a lock as the server knows it, even while it is away.
    ///
    /// ```
    /// let server = tenure::testing::EmbeddedServer::new();
    /// assert_eq!(server.holder("k"), None);
    /// ```
    pub fn holder(&self, key: impl Into<Key>) -> Option<Holder> {
        self.embedded.store.inspect_now(&key.into())
    }

    pub(crate) fn embedded(&self) -> &Arc<Embedded> {
        &self.embedded
    }
}

impl fmt::Debug for EmbeddedServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedServer").field("embedded", &self.embedded).finish()
    }
}
