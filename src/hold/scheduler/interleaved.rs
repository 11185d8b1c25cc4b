//! The scheduler under random schedules: at each lock of a mutex of [`sync`](crate::sync), shuttle chooses who goes on.
//! The tasks run on one thread, which also moves the time. Guards come and go on others.

use std::sync::atomic::{AtomicBool, Ordering};

use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use tokio::runtime::Builder;
use tokio::task::yield_now;
use tokio::time::advance;

use super::tests::{Lock, World, ms};
use super::*;
use crate::Loss;
use crate::hold::FinalStep;
use crate::hold::timing::Renewal;
use crate::store::faulty::Fault;
use crate::sync::turn;

/// How often locks are renewed. One of the former may come while the task sleeps until one of the latter is due.
const OFTEN: Duration = ms(60);
const RARELY: Duration = ms(450);

/// The steps in which the time moves.
const STEP: Duration = ms(40);

/// A call of another lock's renewal may be under way, and takes 20 ms.
const LATE: Duration = ms(60);

/// What a thread does to its locks.
#[derive(Clone, Copy)]
enum Guard {
    Dropped,
    /// The lock is gone, and there is nothing left to do for it.
    Removed,
    Kept,
}

fn remove(lock: &Lock) {
    lock.hold.end(Loss::Taken);
    lock.hold.set_final_step(FinalStep::Nothing);
    lock.handle.remove();
}

/// Locks and does that at any time, three times over. Returns the locks.
fn guards(world: &World, name: &str) -> Vec<(Lock, Guard)> {
    let one = |n| {
        (0..thread_rng().gen_range(0..20)).for_each(|_| turn());
        let (first, second) = (format!("{name}{n}"), format!("{name}{n}'"));
        // A lock of two keys is not renewed in a batch.
        let keys =
            if thread_rng().gen_bool(0.3) { vec![first.as_str(), second.as_str()] } else { vec![first.as_str()] };
        let every = if thread_rng().gen_bool(0.5) { OFTEN } else { RARELY };
        let lock = world.lock(&keys, Renewal::Every(every));
        world.log.note("locked", &first);
        (0..thread_rng().gen_range(0..40)).for_each(|_| turn());
        let guard = [Guard::Dropped, Guard::Removed, Guard::Kept][thread_rng().gen_range(0..3)];
        match guard {
            Guard::Dropped => lock.drop_guard(),
            Guard::Removed => remove(&lock),
            Guard::Kept => lock.handle.interrupt(),
        }
        (lock, guard)
    };
    (0..3).map(one).collect()
}

fn schedule() {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let (runtime, is_over) = (Arc::new(runtime), Arc::new(AtomicBool::new(false)));
    let entered = runtime.enter();
    let world = Arc::new(World::new(|call| if call % 2 == 0 { Fault::None } else { Fault::AnsweredAfter(ms(20)) }));
    let tasks = thread::spawn({
        let (runtime, is_over) = (runtime.clone(), is_over.clone());
        move || {
            while !is_over.load(Ordering::Relaxed) {
                let step = if thread_rng().gen_bool(0.2) { STEP } else { Duration::ZERO };
                runtime.block_on(async {
                    advance(step).await;
                    // So that what wakes up at this time has started before the time moves on.
                    for _ in 0..6 {
                        yield_now().await;
                    }
                });
                turn();
            }
        }
    });
    let threads = ["a", "b", "c"].map(|name| {
        let world = world.clone();
        thread::spawn(move || guards(&world, name))
    });
    let locks: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    is_over.store(true, Ordering::Relaxed);
    tasks.join().unwrap();
    // Without any more time, as nothing that was called waits for its time. A release takes one call.
    (0..16).for_each(|_| runtime.block_on(yield_now()));
    let happened = world.log.take();
    for (lock, guard) in &locks {
        let key = lock.hold.owned.key().to_string();
        let has = |what: &str| happened.iter().any(|line| line.split(' ').skip(1).eq([what, key.as_str()]));
        match guard {
            Guard::Dropped => assert!(has("release"), "{key} is not released: {happened:?}"),
            Guard::Removed => assert!(has("Taken"), "{key} is not removed: {happened:?}"),
            Guard::Kept => assert!(lock.hold.check().is_ok(), "{key}: {happened:?}"),
        }
    }
    world.log.note("over", "");
    let end = world.log.take();
    for (lock, _) in locks.iter().filter(|(_, guard)| matches!(guard, Guard::Kept)) {
        let (key, every) = (lock.hold.owned.key().to_string(), lock.hold.renewal_interval().unwrap());
        let mut last = None;
        for line in happened.iter().chain(&end) {
            let (at, what) = line.split_once(": ").unwrap();
            let (at, mut words) = (ms(at.parse().unwrap()), what.split(' '));
            let is_about_it = match words.next().unwrap() {
                "locked" | "renew" => words.any(|lock| lock == key),
                what => what == "over",
            };
            if is_about_it {
                let since = last.replace(at).map_or(Duration::ZERO, |last| at - last);
                assert!(since <= every + STEP + LATE, "{key} was forgotten for {since:?}: {happened:?}");
            }
        }
    }
    locks.iter().for_each(|(lock, _)| remove(lock));
    drop((locks, world));
    while runtime.metrics().num_alive_tasks() > 0 {
        runtime.block_on(advance(ms(100)));
    }
    drop(entered);
}

#[test]
fn whatever_is_due_or_called_runs_at_its_time_whoever_comes_and_goes_meanwhile() {
    shuttle::check_random(schedule, 500);
}
