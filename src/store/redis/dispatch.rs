//! Runs one operation at the server: in a call with others, or by itself.

use std::time::Duration;

use tokio::time::Instant;

use super::RedisStore;
use super::batcher::Executor;
use super::operation::Operation;
use super::replies::Decision;
use super::slot::slot_of;
use crate::Error;

/// The lane of all operations, where calls may have keys of several slots.
pub(super) const SHARED_LANE: u16 = 0;

impl RedisStore {
    pub(super) async fn run(&self, operation: Box<Operation>, timeout: Duration) -> Result<Decision, Error> {
        // On a cluster, a call may only have keys of one slot.
        let lane = match self.server().takes_one_slot() {
            true => slot_of(&operation.name),
            false => SHARED_LANE,
        };
        if self.server().router.is_moving(lane) {
            let now = Instant::now();
            return Box::pin(self.server().run_one(&operation, now, now + timeout)).await;
        }
        self.batcher.run(lane, operation, timeout).await
    }
}
