//! The same histories on a real server, through a proxy for each process. They are slower and never repeat exactly, so
//! there are only a few. The server is observed from outside, by queries, so promises 2 and 4 are checked now and then.

use std::future::pending;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tenure_test_support::{Mode, Proxy, Server};
use tokio::runtime::Builder;
use tokio::select;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{sleep, timeout};

use super::actor::{Actor, COMMAND_TIMEOUT, Dog, Habits, Process};
use super::ms;
use super::oracle::{Violation, World};
use super::universe::number;
use crate::{Key, Locker, Token};

/// The greatest delay of a request in ms.
const LATEST: u64 = 3_000;

/// Changes the mode of the proxy for as long as it is polled.
async fn weather(proxy: &Proxy, mut rng: fastrand::Rng) {
    loop {
        let mode = match rng.u8(..8) {
            0 => Mode::LoseNext,
            1 => Mode::SwallowNext,
            2 => Mode::Delay(ms(rng.u64(..700))),
            3 => Mode::DeliverNextLate(ms(rng.u64(..LATEST))),
            4 => Mode::Silence,
            _ => Mode::Pass,
        };
        proxy.set(mode);
        sleep(ms(rng.u64(50..600))).await;
    }
}

/// Checks promise 2, as far as it can be seen from outside.
async fn observe(world: Arc<World>, observer: Locker) {
    loop {
        for key in &world.keys {
            let claims = world.claims(key);
            if let Ok(holders) = observer.holders(key.clone()).await {
                world.compare(key, claims, &holders);
            }
        }
        sleep(ms(5)).await;
    }
}

/// Makes the server forget everything now and then, which this kind of lock does not survive.
async fn forget(server: &Server) {
    loop {
        sleep(ms(700)).await;
        server.cli(&["FLUSHALL"]);
    }
}

async fn history(seed: u64, forgets: bool) -> Vec<Violation> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let server = Server::start();
    let observer = Locker::connect(&server.url()).await.unwrap();
    let keys: Vec<Key> = ["{s}a", "{s}b", "{s}c"][..rng.usize(1..=3)].iter().map(|&key| Key::from(key)).collect();
    let world = World::begin_outside(keys.clone());
    let tokens: Vec<Token> = (0..rng.usize(1..=2)).map(|n| format!("shared-{n}").parse().unwrap()).collect();
    let habits = Arc::new(Habits::new(&mut rng, &keys, tokens).in_real_time());
    let (mut proxies, mut processes, mut tasks) = (Vec::new(), Vec::new(), JoinSet::new());
    for number in 0..rng.usize(1..=3) {
        let proxy = Proxy::start(server.port()).await;
        let builder = Locker::builder().command_timeout(COMMAND_TIMEOUT);
        // A busy machine may need more than one try.
        let locker = loop {
            if let Ok(locker) = builder.clone().connect(&proxy.url()).await {
                break locker;
            }
        };
        let dog = Mutex::new(Dog::new(&locker));
        let process = Arc::new(Process { number, locker, dog });
        for _ in 0..rng.usize(1..=3) {
            let (world, habits, process) = (world.clone(), habits.clone(), process.clone());
            let actor = Actor { world, habits, process, rng: rng.fork(), guards: Vec::new(), parked: Vec::new() };
            tasks.spawn_local(actor.run(rng.usize(2..12)));
        }
        proxies.push((proxy, rng.fork()));
        processes.push(process);
    }
    let storms = async {
        let mut storms = JoinSet::new();
        for (proxy, rng) in proxies {
            storms.spawn_local(async move {
                let storm = timeout(Duration::from_secs(40), weather(&proxy, rng)).await;
                drop(storm);
                proxy.set(Mode::Pass);
                pending::<()>().await;
            });
        }
        pending::<()>().await;
    };
    let all = async {
        if timeout(Duration::from_secs(120), tasks.join_all()).await.is_err() {
            world.violate("a task does not end", String::new());
        }
        for process in &processes {
            let next = Dog::new(&process.locker);
            std::mem::replace(&mut *process.dog.lock().unwrap(), next).abandon(&world);
        }
        for process in &processes {
            if timeout(Duration::from_secs(60), process.locker.close()).await.is_err() {
                world.violate("close() does not return", String::new());
            }
        }
        sleep(ms(LATEST + 5_000)).await;
    };
    select! {
        () = all => {}
        () = observe(world.clone(), observer.clone()) => {}
        () = storms => {}
        () = forget(&server), if forgets => {}
    }
    for key in &world.keys {
        for holder in observer.holders(key.clone()).await.unwrap_or_default() {
            world.left_outside(key, &holder);
        }
    }
    world.end().0
}

/// Plays the histories, some at a time, each on its own thread. Returns those that broke a promise.
fn play(seeds: std::ops::Range<u64>, forgets: bool) -> Vec<(u64, Vec<Violation>)> {
    let seeds: Vec<u64> = seeds.collect();
    let one = move |seed| {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        (seed, runtime.block_on(LocalSet::new().run_until(history(seed, forgets))))
    };
    let mut played = Vec::new();
    for seeds in seeds.chunks(4) {
        let threads: Vec<_> = seeds.iter().map(|&seed| thread::spawn(move || one(seed))).collect();
        played.extend(threads.into_iter().map(|thread| thread.join().unwrap()));
    }
    played.retain(|(_, violations)| !violations.is_empty());
    played
}

#[test]
#[ignore = "needs a server; tests/internals.rs runs it"]
fn no_history_on_a_real_server_breaks_a_promise() {
    let first = number("TENURE_FIRST_REAL_HISTORY").unwrap_or(0);
    let found = play(first..first + number("TENURE_REAL_HISTORIES").unwrap_or(4), false);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
#[ignore = "needs a server; tests/internals.rs runs it"]
fn a_real_server_that_forgets_is_found_out_or_the_histories_are_toothless() {
    // On a busy machine, few of them are doing anything when the server forgets.
    assert!((0..8).any(|n| !play(n * 4..(n + 1) * 4, true).is_empty()));
}
