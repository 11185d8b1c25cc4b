//! The supervisor under random schedules: at each lock of its mutex, shuttle chooses who goes on. Whatever a waiter
//! leaves to it is done.

use std::future::pending;
use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use shuttle::thread::{self, JoinHandle};
use tokio::runtime::Builder;

use super::*;
use crate::sync::turn;

#[derive(Default)]
struct World {
    supervisor: Supervisor,
    /// What there is to do.
    work: AtomicUsize,
    tasks: StdMutex<Vec<JoinHandle<()>>>,
}

/// A waiter that has entered its queue.
fn rely_on(world: &Arc<World>, runtime: &Handle) {
    turn();
    world.work.fetch_add(1, Ordering::Relaxed);
    turn();
    world.supervisor.start_if_needed(Instant::now(), runtime.id(), |number| {
        let task = thread::spawn({
            let world = world.clone();
            move || supervise(&world, number)
        });
        world.tasks.lock().unwrap().push(task);
        AbortOnDropHandle::new(runtime.spawn(pending()))
    });
}

fn supervise(world: &World, number: u64) {
    loop {
        world.supervisor.begin_check(number, Instant::now());
        let has_work = world.work.swap(0, Ordering::Relaxed) > 0;
        turn();
        if !has_work && world.supervisor.end(number) {
            return;
        }
    }
}

#[test]
fn no_waiter_relies_on_a_task_that_is_about_to_end() {
    let schedule = || {
        let runtime = Builder::new_current_thread().build().unwrap();
        let world = Arc::new(World::default());
        let waiters = [(); 3].map(|()| {
            let (world, runtime) = (world.clone(), runtime.handle().clone());
            thread::spawn(move || (0..2).for_each(|_| rely_on(&world, &runtime)))
        });
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
        loop {
            let Some(task) = world.tasks.lock().unwrap().pop() else { break };
            task.join().unwrap();
        }
        assert_eq!(world.work.load(Ordering::Relaxed), 0, "nobody does it");
    };
    shuttle::check_random(schedule, 2_000);
}
