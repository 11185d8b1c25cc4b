//! What the crate reports through [`tracing`](https://docs.rs/tracing): all events and spans, and their fields.
//!
//! Level `info` reports nothing of a lock that is obtained, renewed and released as it should be. Each `warn` is worth
//! reading: a lock is lost, or will be unless the server comes back. No event and no span shows a token.
//!
//! The name of an event is its target as well, so formatters show it, and the filter `tenure=debug` includes all of
//! them. This is what `tracing_subscriber::fmt` prints of a lock that is obtained, renewed once, and then deleted by
//! somebody, without the times:
//!
//! ```text
//! DEBUG tenure.obtain{key=k ttl=30s}: tenure.obtained: obtained waited=1.1ms attempts=1
//!     remaining=29.7s
//! DEBUG tenure.keep{key=k}: tenure.renewed: renewed remaining=29.7s took=410.3µs
//!  WARN tenure.keep{key=k}: tenure.lost: lost key=k loss=its key is gone from the server
//! ```
//!
//! `tenure.obtain` and `tenure.keep` are children of the span in which the request is awaited, or
//! [`adopt`](crate::Locker::adopt) is, and so part of its trace: a line that tells of a loss shows whose lock it was.
//! Subscribers such as that of OpenTelemetry report a span when all its children have ended. So where a lock is held
//! for much longer than its caller's span should last, await the request in a span of its own:
//! `async { request.await }.instrument(info_span!("leader"))`.
//!
//! | event | level | fields | meaning |
//! | --- | --- | --- | --- |
//! | `tenure.obtain` | info span | `key`, `ttl` | One per request. `key` lists all keys of the request. |
//! | `tenure.keep` | info span | `key` | A renewal, or the end of a lock. |
//! | `tenure.obtained` | debug | `waited`, `attempts`, `remaining` | The lock is held. |
//! | `tenure.held` | debug | `key`, `attempts`, `waited`, `remaining` | Another holder has the lock. |
//! | `tenure.attempt_failed` | warn, debug | `attempts`, `waited`, `error` | The server failed or was unreachable. |
//! | `tenure.too_late` | debug | `waited`, `attempts`, `remaining` | The grant came too late to be of use. |
//! | `tenure.undone` | debug | `key` | An attempt without a reply was undone. |
//! | `tenure.undo_failed` | debug, warn | `key`, `error` | It could not be undone; its ttl will free the lock. |
//! | `tenure.handed_over` | debug | `key` | A holder released the lock to the next waiter of this process. |
//! | `tenure.downgraded` | debug | `key` | A holder of a lock became a reader. |
//! | `tenure.downgrade_failed` | debug | `key`, `error` | One node of a quorum keeps the lock until its ttl ends. |
//! | `tenure.taken_back` | debug | `key` | The lock was handed over to a future that nobody polls. |
//! | `tenure.renewed` | debug | `remaining`, `took` | The lock was renewed. |
//! | `tenure.renew_failed` | warn, debug | `failures`, `remaining`, `pause`, `error` | `warn`: the first in a row. |
//! | `tenure.lost` | warn | `key`, `loss`, `cause` | The lock is lost. Its release may be the first to find that. `cause`: why it could not be renewed. |
//! | `tenure.released` | debug | `key`, `outcome` | The lock was released; with `outcome`, in the background. |
//! | `tenure.force_released` | debug | `key`, `ended` | `force_release()` has ended the lock, if there was one. |
//! | `tenure.release_failed` | debug, warn | `key`, `error` | It could not be released; the ttl will free it. |
//! | `tenure.cleanup_adopted` | debug | | `close()` does a cleanup that its own task left undone. |
//! | `tenure.no_news` | debug, warn | `error` | There is no subscription. Until there is, waiters poll. |
//! | `tenure.heartbeat_failed` | debug | `key`, `error` | A waiter could not report that it is alive. |
//! | `tenure.leave_failed` | debug | `key`, `error` | A waiter could not leave the line; its place expires. |
//! | `tenure.without_line` | debug | `error` | The user may not use the line; waiters poll. |
//! | `tenure.server_away` | debug | `error`, `left` | Connecting failed; it goes on for the time that `wait_for_server` allows. |
//! | `tenure.reconnect` | debug | | The client did not take the request to reconnect. |
//! | `tenure.revive` | debug | `stalled` | A connection or subscription moves to a running runtime. |
//! | `tenure.mixed_up` | warn | | The client returned the reply to another request; it reconnects. |
//! | `tenure.slots_failed` | debug | `error` | No node of a cluster told who owns its slots. |
//! | `tenure.node_failed` | debug | `server`, `error` | A connection to a node of a cluster was dropped. |
//! | `tenure.wait_failed` | debug | `error` | Asking which replicas have a write failed. |
//! | `tenure.ballot` | debug | `ballot` | The nodes need a higher fencing token; one more round. |
//! | `tenure.healed` | debug | `key`, `node` | A node that had lost the key has it again. |
//! | `tenure.node_away` | warn | `node`, `error` | A node could not be connected to yet. |
//! | `tenure.same_node` | warn | `node` | Two URLs name databases of one server. |
//! | `tenure.same_server` | warn | `node`, `other` | Two addresses lead to one server, which has one vote. |
//! | `tenure.node_is_replica` | warn | `node` | The node follows another server, and can't vote. |
//! | `tenure.node_was_promoted` | warn | `node` | The node was a replica, and may lack what was granted before. |
//! | `tenure.node_may_forget` | warn | `node` | A restart of the node can give a lock to a second holder. |
//! | `tenure.callback_panicked` | error | `key`, `panic` | The callback panicked; the next event is delivered. |
//! | `tenure.callback_delayed` | error | `error` | There was no thread for the callback. |
