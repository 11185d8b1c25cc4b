//! A quorum of three under contention, and with one node that is slow, dead or silent.

use std::time::{Duration, Instant};

use tenure::Locker;
use tenure_test_support::{Mode, Proxy, Server};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::statistics::median;
use crate::{quorum, scripts_run};

/// The delay of a slow node's replies.
const SLOW: Duration = Duration::from_millis(500);

/// The state of the third node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Third {
    Well,
    /// Each of its replies is late.
    Slow,
    /// Nobody listens there.
    Dead,
    /// It accepts requests and never replies.
    Silent,
}

pub(crate) async fn measure(length: Duration) {
    println!(
        "\nEight tasks for one key on three nodes, for {length:?} each; and the time of each call with such a node"
    );
    println!(
        "  third node | lockers | turns/s | longest ms | calls/turn | obtain us | renew us | release us | drop us"
    );
    for third in [Third::Well, Third::Slow, Third::Dead, Third::Silent] {
        for lockers in [2, 8] {
            measure_beside(third, lockers, length).await;
        }
    }
}

async fn measure_beside(third: Third, count: usize, length: Duration) {
    let mut servers = [(); 3].map(|()| Server::start());
    let proxy = Proxy::start(servers[2].port()).await;
    let urls = [servers[0].url(), servers[1].url(), proxy.url()];
    let mut lockers = Vec::new();
    for _ in 0..count {
        lockers.push(quorum(urls.iter()).await);
    }
    for locker in &lockers {
        locker.lock("warm").await.expect("a lock").release().await.expect("held");
    }
    match third {
        Third::Well => {}
        Third::Slow => proxy.set(Mode::Delay(SLOW)),
        // A proxy without a server accepts connections and closes them.
        Third::Dead => servers[2].kill(),
        Third::Silent => servers[2].freeze(),
    }
    sleep(Duration::from_millis(100)).await;
    let first = lockers.first().expect("a locker");
    let alone = alone(first).await;
    let scripts = scripts_run(servers.iter().take(2));
    let (turns, longest) = crowd(&lockers, length).await;
    let calls = (scripts_run(servers.iter().take(2)) - scripts) / 2.0 / turns;
    if third == Third::Silent {
        servers[2].thaw();
    }
    println!(
        "  {:<10} | {count:>7} | {:>7.0} | {:>10.1} | {calls:>10.2} | {:>9.0} | {:>8.0} | {:>10.0} | {:>7.0}",
        format!("{third:?}").to_lowercase(),
        turns / length.as_secs_f64(),
        longest.as_secs_f64() * 1e3,
        alone[0],
        alone[1],
        alone[2],
        alone[3],
    );
}

/// Returns the turns per second, and the longest wait for one.
async fn crowd(lockers: &[Locker], length: Duration) -> (f64, Duration) {
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for task in 0..8 {
        let locker = lockers.get(task % lockers.len()).expect("a locker").clone();
        tasks.spawn(async move {
            let (mut turns, mut longest) = (0.0, Duration::ZERO);
            while started.elapsed() < length {
                let asked = Instant::now();
                let guard = locker.lock("k").await.expect("a lock");
                longest = longest.max(asked.elapsed());
                turns += 1.0;
                drop(guard.release().await);
            }
            (turns, longest)
        });
    }
    let all = tasks.join_all().await;
    all.into_iter().fold((0.0, Duration::ZERO), |sum, (turns, longest)| (sum.0 + turns, sum.1.max(longest)))
}

/// Returns the medians in microseconds: to obtain, renew, release, and until another finds a dropped lock free.
async fn alone(locker: &Locker) -> [f64; 4] {
    let mut samples: [Vec<f64>; 4] = Default::default();
    let micros = |since: Instant| since.elapsed().as_secs_f64() * 1e6;
    for n in 0..40 {
        let key = format!("alone{n}");
        let asked = Instant::now();
        let guard = locker.lock(key.clone()).await.expect("a lock");
        samples[0].push(micros(asked));
        let asked = Instant::now();
        guard.renew().await.expect("held");
        samples[1].push(micros(asked));
        let asked = Instant::now();
        guard.release().await.expect("held");
        samples[2].push(micros(asked));
        let guard = locker.lock(key.clone()).await.expect("a lock");
        let asked = Instant::now();
        drop(guard);
        drop(locker.lock(key).await.expect("a lock").into_lease());
        samples[3].push(micros(asked));
    }
    samples.map(|samples| median(samples.into_iter()))
}
