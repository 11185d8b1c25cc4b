//! The batcher under random schedules: at each lock of its mutex, and whenever the server is asked, shuttle chooses who
//! goes on. An operation that nobody sends is waited for until shuttle has counted too many steps.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use tokio::runtime::Builder;
use tokio::select;
use tokio::sync::Notify;

use super::*;
use crate::sync::turn;

/// Longer than any schedule: time stands still.
const PATIENCE: Duration = Duration::from_secs(60);

/// How many operations each caller runs, one call after the other.
const EACH: usize = 4;

/// Counts how often it has run each operation.
#[derive(Debug, Default)]
struct Counting(std::sync::Mutex<HashMap<usize, usize>>);

impl Counting {
    async fn run(&self, operations: &[usize]) {
        turn();
        operations.iter().for_each(|id| *self.0.lock().unwrap().entry(*id).or_default() += 1);
        yield_now().await;
        turn();
    }
}

impl Executor for Counting {
    type Operation = usize;
    type Output = usize;

    async fn run_one(&self, id: &usize, _: Instant, _: Instant) -> Result<usize, Error> {
        self.run(&[*id]).await;
        Ok(*id)
    }

    async fn run_batch(&self, ids: &[usize], _: Duration) -> Result<BatchResults<usize>, NotRun> {
        if thread_rng().gen_bool(0.1) {
            return Err(NotRun::Refused);
        }
        let (left_out, run): (Vec<_>, Vec<_>) = ids.iter().partition(|_| thread_rng().gen_bool(0.1));
        self.run(&run).await;
        Ok(ids.iter().map(|id| (!left_out.contains(id)).then_some(Ok(*id))).collect())
    }

    fn rank(_: &usize) -> usize {
        0
    }
}

/// Runs operations until told to give up. Returns how many have returned.
async fn call(batcher: &Batcher<Counting>, caller: usize, give_up: &Notify) -> usize {
    let ids: Vec<usize> = (caller * EACH..(caller + 1) * EACH).collect();
    let (alone, together) = ids.split_at(EACH / 2);
    let mut returned = 0;
    let calls = async {
        for id in alone {
            assert_eq!(batcher.run(0, *id, PATIENCE).await.unwrap(), *id, "the result of another");
            returned += 1;
        }
        let results = batcher.run_all(0, together.to_vec(), PATIENCE).await;
        assert_eq!(results.into_iter().map(Result::unwrap).collect::<Vec<_>>(), together);
        returned += together.len();
    };
    select! {
        biased;
        () = give_up.notified() => {}
        () = calls => {}
    }
    returned
}

/// Plays so many schedules with so many callers, some of which give up at any point.
fn schedules(callers: usize, impatient: usize, count: usize) {
    let schedule = move || {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        // Its send loops run on one thread, and the callers on their own.
        let (runtime, is_over) = (Arc::new(runtime), Arc::new(AtomicBool::new(false)));
        let entered = runtime.enter();
        let batcher = Arc::new(Batcher::new(Counting::default()));
        let send_loops = thread::spawn({
            let (runtime, is_over) = (runtime.clone(), is_over.clone());
            move || {
                while !is_over.load(Ordering::Relaxed) {
                    runtime.block_on(yield_now());
                    turn();
                }
            }
        });
        let calls = (0..callers).map(|caller| {
            let (batcher, give_up) = (batcher.clone(), Arc::new(Notify::new()));
            if caller < impatient {
                let give_up = give_up.clone();
                thread::spawn(move || {
                    (0..thread_rng().gen_range(0..30)).for_each(|_| turn());
                    give_up.notify_one();
                });
            }
            thread::spawn(move || block_on(call(&batcher, caller, &give_up)))
        });
        let calls: Vec<_> = calls.collect();
        let returned: Vec<_> = calls.into_iter().map(|call| call.join().unwrap()).collect();
        is_over.store(true, Ordering::Relaxed);
        send_loops.join().unwrap();
        while runtime.metrics().num_alive_tasks() > 0 {
            runtime.block_on(yield_now());
        }
        let runs = batcher.executor().0.lock().unwrap().clone();
        assert!(runs.values().all(|count| *count == 1), "run twice: {runs:?}");
        for (caller, returned) in returned.into_iter().enumerate() {
            assert!(returned == EACH || caller < impatient);
            (0..returned).for_each(|n| assert!(runs.contains_key(&(caller * EACH + n)), "not run: {runs:?}"));
        }
        assert_eq!(format!("{:?}", batcher.shared.lanes()), "Lanes { busy: 0, queued: 0 }");
        drop(entered);
    };
    shuttle::check_random(schedule, count);
}

#[test]
fn each_operation_is_sent_once_and_returns_to_its_caller_whatever_is_done_in_between() {
    schedules(5, 0, 1_000);
}

#[test]
fn callers_that_give_up_at_any_point_hold_up_no_others_and_leave_nothing() {
    schedules(5, 2, 2_000);
}
