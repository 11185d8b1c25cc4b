//! Waiters whose futures are kept and not polled: they must not keep the lock from the others (invariants 3 and 4).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::hand_over::HandOverState;
use super::{LATE, Lane, Queues, TAKEN_WITHIN, lock, remove};
use crate::locker::cleanups::PendingCleanup;
use crate::store::Wanted;

/// A lock that was handed over to a waiter that doesn't take it.
pub(crate) struct Abandoned {
    pub(crate) wanted: Arc<Wanted>,
    pub(crate) pending: Option<PendingCleanup>,
    /// The server has confirmed the hand-over. Otherwise its outcome is unknown, and it may still be run.
    pub(crate) is_confirmed: bool,
}

impl Queues {
    /// Removes unused queues, moves parked waiters behind the others (invariant 3), and takes back what was handed over
    /// to a waiter that doesn't take it (invariant 4). Returns what was taken back, or `None` when no queue needs to be
    /// looked at again.
    pub(crate) fn find_abandoned(&self, now: Instant) -> Option<Vec<Abandoned>> {
        let (mut abandoned, mut firsts, mut has_work) = (Vec::new(), Vec::new(), false);
        for queue in self.queues() {
            let mut guard = lock(&queue.state);
            if guard.is_unused() {
                drop(guard);
                remove(&self.by_key, &queue);
                continue;
            }
            let state = &mut *guard;
            has_work |= state.last_held.is_some();
            for lane in [&mut state.plain, &mut state.fair] {
                has_work |= lane.needs_supervision();
                if lane.check_first(now, &mut abandoned) {
                    lane.expected = Some(now);
                    firsts.extend(lane.first().cloned());
                }
            }
        }
        // Those that became the first (invariant 1), and those whose hand-over has an outcome.
        firsts.iter().for_each(|first| first.changed.notify_one());
        has_work.then_some(abandoned)
    }
}

impl Lane {
    /// Returns whether a waiter here could be kept waiting by one that is not polled.
    fn needs_supervision(&self) -> bool {
        self.first().is_some_and(|first| self.waiters.len() > 1 || !lock(&first.hand_over).is_over())
    }

    /// Returns whether the first waiter is another one now, or has something to learn.
    fn check_first(&mut self, now: Instant, abandoned: &mut Vec<Abandoned>) -> bool {
        let Some(first) = self.first().cloned() else { return false };
        let has_passed = |since: Instant, time| now.saturating_duration_since(since) >= time;
        let mut hand_over = lock(&first.hand_over);
        let is_confirmed = matches!(*hand_over, HandOverState::Granted { .. });
        let held_by = match &*hand_over {
            HandOverState::Granted { taken_over: Some(taken_over), .. } => taken_over.clone(),
            _ => first.wanted.clone(),
        };
        match &mut *hand_over {
            HandOverState::Granted { at, pending, .. } | HandOverState::Unknown { at, pending }
                if has_passed(*at, TAKEN_WITHIN) =>
            {
                abandoned.push(Abandoned { wanted: held_by.clone(), pending: pending.take(), is_confirmed });
                *hand_over = HandOverState::TakenBack;
                self.remove(&first);
                true
            }
            // The release that hands the lock over is not polled.
            HandOverState::InFlight { pending, until: Some(until) } if has_passed(*until, LATE) => {
                *hand_over = HandOverState::Unknown { at: now, pending: pending.take() };
                true
            }
            HandOverState::None | HandOverState::NotGranted if self.waiters.len() > 1 => {
                let is_parked = self.is_first_late(now);
                if is_parked {
                    self.set_parked(&first, true);
                    self.waiters.remove(&first.number());
                    self.last_number += 1;
                    first.number.store(self.last_number, Ordering::Relaxed);
                    self.waiters.insert(self.last_number, first.clone());
                }
                is_parked
            }
            _ => false,
        }
    }
}
