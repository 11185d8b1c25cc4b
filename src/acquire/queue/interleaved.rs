//! The queue under random schedules: at each lock of a mutex of [`sync`](crate::sync), shuttle chooses who goes on. A
//! waiter that is never woken is a deadlock, which shuttle reports together with the schedule.

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use tokio::select;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::tests::{grant, wanted};
use super::{By, Claim, Obtained, Place, Queueing, Queues, Ticket, Wakeup};
use crate::hold::Owned;
use crate::locker::cleanups::{Cleanup, Cleanups};
use crate::store::Wanted;
use crate::sync::turn;
use crate::{Key, Token};

/// For how long by the server's clock, which counts its steps, it may run a request.
const PATIENCE: u64 = 6;

#[derive(Default)]
struct Server {
    clock: u64,
    /// The token that has the lock.
    holder: Option<Token>,
}

/// A process with one queue, and the server.
struct World {
    queues: Queues,
    cleanups: Cleanups,
    server: Mutex<Server>,
    /// The server notifies of a release.
    released: Notify,
    /// How many believe that they hold the lock.
    inside: AtomicUsize,
    served: AtomicUsize,
}

impl World {
    fn new() -> Self {
        Self {
            queues: Queues::default(),
            cleanups: Cleanups::new(TaskTracker::new()),
            server: Mutex::default(),
            released: Notify::new(),
            inside: AtomicUsize::new(0),
            served: AtomicUsize::new(0),
        }
    }

    /// One step of the server, which others may come before and after.
    fn ask<T>(&self, step: impl FnOnce(&mut Server) -> T) -> T {
        turn();
        let done = {
            let mut server = self.server.lock().unwrap();
            server.clock += 1;
            step(&mut server)
        };
        turn();
        done
    }

    fn acquire(&self, token: &Token) -> bool {
        self.ask(|server| server.holder.get_or_insert_with(|| token.clone()) == token)
    }

    /// Returns the time by the server's clock.
    fn release(&self, token: &Token) -> u64 {
        let (is_released, now) =
            self.ask(|server| (server.holder.take_if(|holder| holder == token).is_some(), server.clock));
        if is_released {
            self.released.notify_waiters();
        }
        now
    }

    /// Undoes what a hand-over may have given to the request, until none can any longer.
    fn undo(&self, wanted: &Wanted) {
        while wanted.latest.remaining(self.release(&wanted.owned.token)).is_some() {}
    }

    /// Waits for the lock, holds it and releases it; or gives up when it is told to.
    async fn take_a_turn(&self, give_up: &Notify) {
        let wanted = wanted(Queueing::Shared);
        let token = &wanted.owned.token;
        let ticket = self.queues.enter(Key::from("k"), wanted.clone());
        let by = select! {
            biased;
            () = give_up.notified() => None,
            by = self.obtain(&ticket, token) => Some(by),
        };
        if let Some(by) = by {
            let at = Instant::now();
            ticket.pass_on(None, Obtained { at, held_until: at, by }, token);
        }
        let leftovers = ticket.leave();
        if by.is_none() {
            if leftovers.may_hold {
                self.undo(&wanted);
            }
            return;
        }
        assert_eq!(self.inside.fetch_add(1, Ordering::Relaxed), 0, "two holders");
        turn();
        self.inside.fetch_sub(1, Ordering::Relaxed);
        self.served.fetch_add(1, Ordering::Relaxed);
        self.pass_on(&wanted.owned);
    }

    async fn obtain(&self, ticket: &Ticket, token: &Token) -> By {
        loop {
            if let Some(by) = Self::claim(ticket, ticket.until_first().await) {
                return by;
            }
            let mut released = pin!(self.released.notified());
            released.as_mut().enable();
            if self.acquire(token) {
                assert!(matches!(ticket.claim(), Claim::Kept(_)));
                return By::Asking(Place::Untouched);
            }
            select! {
                biased;
                wakeup = ticket.until_handed_over() => if let Some(by) = Self::claim(ticket, wakeup) {
                    return by;
                },
                () = released => {}
            }
        }
    }

    fn claim(ticket: &Ticket, wakeup: Wakeup) -> Option<By> {
        match wakeup {
            Wakeup::HandedOver(..) => {
                assert!(matches!(ticket.claim(), Claim::Kept(_)));
                Some(By::HandOver)
            }
            // It asks the server.
            Wakeup::First | Wakeup::NotHandedOver | Wakeup::Unknown(_) => None,
            Wakeup::TakenOver(..) | Wakeup::TakenBack => unreachable!("nobody does that here"),
        }
    }

    /// Releases the lock, or hands it over. Some replies are lost.
    fn pass_on(&self, owned: &Owned) {
        if let Some(hand_over) = self.queues.next(owned) {
            let to = hand_over.wanted().clone();
            let pending = self.cleanups.register(Cleanup::Undo(to.clone()));
            hand_over.send(pending, Instant::now() + Duration::from_secs(1));
            // One that came too late is sent once more.
            let is_done = self.hand_over(owned, &to) || self.hand_over(owned, &to);
            if is_done && thread_rng().gen_bool(0.8) {
                if !hand_over.granted(grant(), true) {
                    self.undo(&to);
                }
                return;
            }
            // The waiter learns that the outcome is unknown.
            drop(hand_over);
        }
        self.release(&owned.token);
    }

    fn hand_over(&self, owned: &Owned, to: &Wanted) -> bool {
        let until = self.server.lock().unwrap().clock + PATIENCE;
        turn();
        to.latest.extend(until);
        self.ask(|server| {
            let is_in_time = server.clock <= until;
            if is_in_time {
                let before = server.holder.replace(to.owned.token.clone());
                assert_eq!(before.as_ref(), Some(&owned.token), "the lock was ours");
            }
            is_in_time
        })
    }
}

/// Plays so many schedules with so many waiters, some of which give up at any point.
fn schedules(waiters: usize, impatient: usize, count: usize) {
    shuttle::check_random(
        move || {
            let world = Arc::new(World::new());
            let turns = (0..waiters).map(|n| {
                let (world, give_up) = (world.clone(), Arc::new(Notify::new()));
                if n < impatient {
                    let give_up = give_up.clone();
                    thread::spawn(move || {
                        (0..thread_rng().gen_range(0..40)).for_each(|_| turn());
                        give_up.notify_one();
                    });
                }
                thread::spawn(move || block_on(world.take_a_turn(&give_up)))
            });
            let turns: Vec<_> = turns.collect();
            turns.into_iter().for_each(|turn| turn.join().unwrap());
            assert!(world.served.load(Ordering::Relaxed) >= waiters - impatient);
            assert_eq!(world.server.lock().unwrap().holder, None, "the lock is free");
            assert!(world.queues.by_key.lock().unwrap().is_empty(), "no queue is left");
        },
        count,
    );
}

#[test]
fn each_waiter_is_served_and_no_two_at_once_whatever_is_done_in_between() {
    schedules(4, 0, 1_000);
}

#[test]
fn whoever_gives_up_at_whatever_point_leaves_the_lock_and_the_queue_to_the_others() {
    schedules(4, 2, 2_000);
}
