//! A job that every machine of a fleet starts by its own clock, and that runs once per period all the same.
//!
//!     cargo run -p tenure-recipes --example once_per_period
//!
//! A lock alone is not enough. The job may take a second, and clocks differ by more: a machine that is late would find
//! the lock free again. So the key stays taken for half of the period.

use std::time::Duration;

use tenure::{Error, LockGuard, Locker};
use tokio::time::{Instant, sleep, sleep_until};

/// Runs the job, unless another machine has run it in this period or does so now: then it returns `None`.
async fn once_per<T>(
    period: Duration,
    locker: &Locker,
    key: &str,
    job: impl AsyncFnOnce(&LockGuard) -> T,
) -> Result<Option<T>, Error> {
    // Longer than clocks differ; shorter than the period, so that the key is free when the next one begins.
    match locker.try_lock(key).hold_at_least(period / 2).await {
        Ok(guard) => {
            let done = guard.protect(job(&guard)).await?;
            guard.release().await?;
            Ok(Some(done))
        }
        Err(Error::NotObtained { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// One machine, whose clock is late by `late`: starts the job at the beginning of each period.
async fn machine(name: u32, late: Duration, period: Duration, periods: u32, locker: Locker) -> Result<u32, Error> {
    let (start, mut ran) = (Instant::now() + late, 0);
    for n in 0..periods {
        sleep_until(start + period * n).await;
        let report = async |_guard: &LockGuard| sleep(Duration::from_millis(50)).await;
        match once_per(period, &locker, "report", report).await? {
            Some(()) => {
                println!("period {n}: machine {name} has sent the report");
                ran += 1;
            }
            None => println!("period {n}: machine {name} has nothing to do"),
        }
    }
    Ok(ran)
}

async fn fleet(machines: u32, period: Duration, periods: u32, locker: &Locker) -> Result<u32, Error> {
    let each = (0..machines).map(|name| {
        let late = period / 8 * name / machines;
        tokio::spawn(machine(name, late, period, periods, locker.clone()))
    });
    let mut ran = 0;
    for machine in each.collect::<Vec<_>>() {
        ran += machine.await.map_err(|_| Error::Closed)??;
    }
    Ok(ran)
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let locker = Locker::in_memory(); // or Locker::connect("redis://127.0.0.1:6379").await?
    let ran = fleet(3, Duration::from_secs(2), 3, &locker).await?;
    println!("3 machines, 3 periods, {ran} reports");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[tokio::test(start_paused = true)]
    async fn a_fleet_whose_clocks_differ_runs_it_once_per_period() {
        assert_eq!(fleet(20, HOUR, 24, &Locker::in_memory()).await.unwrap(), 24);
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_that_takes_longer_than_its_period_never_runs_twice_at_once() {
        let locker = Locker::in_memory();
        let long = once_per(HOUR, &locker, "report", async |_| sleep(HOUR + HOUR / 2).await);
        let next = async {
            sleep(HOUR).await;
            once_per(HOUR, &locker, "report", async |_| ()).await
        };
        let (long, next) = tokio::join!(long, next);
        assert!(long.unwrap().is_some() && next.unwrap().is_none());
        // Its key was taken for longer than half a period, so the one after that runs as usual.
        assert!(once_per(HOUR, &locker, "report", async |_| ()).await.unwrap().is_some());
    }
}
