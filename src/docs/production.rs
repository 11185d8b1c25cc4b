//! What to check before a lock guards something that matters.
//!
//! # The server
//!
//! - **It doesn't evict.** `maxmemory-policy` is `noeviction`, or the server has memory to spare. The policies
//!   `volatile-*` evict first what has a ttl, which locks have. A cache and locks should not share a server.
//! - **It remembers.** A server that is restarted without its data grants a lock again that is still held. The first
//!   holder notices at its next renewal, so there are two of them for up to a third of the ttl. `appendonly yes` with
//!   `appendfsync always` forgets nothing, with `everysec` a second's worth. If it forgets, let it stay down for longer
//!   than your longest ttl.
//! - **It has replicas for a reason.** Replication is asynchronous: a failover forgets what the new primary hadn't
//!   received. With [`min_replicas`](crate::LockerBuilder::min_replicas), a lock counts when that many replicas have
//!   it. A failover is safe only if that is the number of all replicas, and then nothing can be locked while one of
//!   them is away. With a smaller number, a replica that lacks the lock may be promoted.
//! - **Or it is one of several.** [`Locker::quorum`](crate::Locker::quorum) needs 3 or 5 servers with separate power
//!   and no replicas. Restart them one by one. When one is up again, wait for a [restart
//!   window](crate::LockerBuilder::restart_window) (60 s), 2 s, and one renewal interval (by default a third of the
//!   ttl) before you restart the next: then the node has all held locks again.
//! - **Its clock is steady.** It need not be right, but a step forwards ends locks early, and a step backwards makes
//!   them last. NTP should slew it, not set it.
//! - **It isn't busy with others.** A script of another client that runs for seconds, `KEYS`, or a fork of a large
//!   memory delays renewals. They are retried until the deadline; the metric
//!   `tenure_renewal_left_seconds` shows how close that gets (feature `metrics`).
//! - **It has memory for fencing tokens.** Each key that was locked with one leaves a key of about 133 bytes for 24 h:
//!   133 MB for a million different keys a day. [`fence_ttl`](crate::LockerBuilder::fence_ttl) shortens that.
//! - **The user may do what is needed, and nothing else.** The README lists the rights of an ACL user. Without those
//!   for pub/sub and the line, waiting works but checks only every second.
//!
//! # The locker
//!
//! - **One for the process**, cloned. It holds one connection for commands and one for notifications.
//! - **A prefix for the application**: `Locker::builder().prefix("billing:")`. It keeps keys of different services
//!   apart, and an ACL can be written for it.
//! - **The ttl** is what you can wait for after a machine has died, and longer than the server may be away: a restart
//!   or failover that takes 15 s costs every lock with a ttl of 10 s. 30 s is a good default.
//! - **The command timeout** (2 s) is at most a third of the ttl, so that a renewal can fail once and be tried again.
//! - **A runtime that isn't blocked.** Code that computes for seconds without an await holds up renewals like any other
//!   task. Put it on `spawn_blocking`, or let the locker have
//!   [a thread of its own](crate::LockerBuilder::isolated).
//! - **At start-up** a server that can't be reached is an error of [`connect`](crate::Locker::connect). Let your
//!   supervisor restart the process, or wait with [`wait_for_server`](crate::LockerBuilder::wait_for_server), or start
//!   without it with [`connect_lazily`](crate::LockerBuilder::connect_lazily). After that the locker reconnects for as
//!   long as it lives.
//!
//! # The work
//!
//! - **It notices a loss.** Every piece of work under a lock is in [`protect`](crate::LockGuard::protect), watches
//!   [`lost`](crate::LockGuard::lost) or a [token](crate::LockGuard::cancellation_token), or calls
//!   [`check`](crate::LockGuard::check) between its steps. How long does it take at most from one such point to the
//!   next? The deadline lies 1 % of the ttl and 2 ms before the ttl ends, so a step between two such points that takes
//!   longer than that may still run when another has the lock.
//! - **What must never happen twice is fenced.** The store refuses a write with a smaller
//!   [fencing token](crate::LockGuard::fencing_token) than one that it has seen.
//! - **It has a limit**, if it can hang: [`hold_at_most`](crate::LockRequest::hold_at_most).
//! - **Waiting has a limit**, if a caller is waiting: [`wait_at_most`](crate::LockRequest::wait_at_most).
//! - **It says who it is**: [`metadata`](crate::LockRequest::metadata) with the host and the job, for whoever looks
//!   with [`inspect`](crate::Locker::inspect) at night.
//!
//! # The end
//!
//! - **SIGTERM leads to [`close_within`](crate::Locker::close_within)**, with a limit below the time that your
//!   supervisor grants (30 s with Kubernetes). What isn't released then is free when its ttl ends.
//! - **Work ends before that.** Closing doesn't wait for guards that are still held.
//!
//! # Watching
//!
//! - **Alert on losses.** The event `tenure.lost` (level warn) has the key, and the reason why renewals failed. The
//!   module `metrics` has three alerts worth having (feature `metrics`).
//! - **Rehearse a restart of the server** once, under load: what do your jobs do?
//!
//! # What it needs
//!
//! Redis 6.2 or later, or Valkey; standalone, under Sentinels, as a cluster, or as a quorum. Hosted services work if
//! they allow Lua scripts, and in these `TIME`, and `PUBSUB` if waiters are to be notified. The nodes of a quorum must
//! allow `INFO` as well, unless the restart window is off. A proxy that spreads keys over servers works if it keeps
//! keys with the same hash tag together.
//!
//! It is not promised yet that two versions of tenure can share keys, as in a rolling deployment: the scripts, and what
//! they keep beside a lock, may still change from one version to the next. The lock key itself is what other libraries
//! understand, too: a string that is set by `SET key token NX PX`.
