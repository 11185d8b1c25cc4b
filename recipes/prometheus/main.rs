//! What tenure measures, for Prometheus: on http://127.0.0.1:9000/metrics.
//!
//!     cargo run -p tenure-recipes --example prometheus
//!
//! Beside this file are `alerts.yml`, three alerts worth having, with tests of them in `alerts_test.yml`, and
//! `dashboard.json` for Grafana (Dashboards, New, Import). Both expect the buckets that are set here.

use std::time::Duration;

use axum::Router;
use axum::routing::get;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tenure::{Locker, metrics as names};
use tokio::net::TcpListener;
use tokio::time::sleep;

/// In seconds. Without buckets, the exporter reports quantiles, which can't be added up over a fleet.
const QUICK: [f64; 10] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0];
const LONG: [f64; 12] = [0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0];
/// When all is well, two thirds of the ttl are left: 20 s of 30 s, and 2 s of 3 s. Each is at most twice the one before,
/// as the alert compares quantiles by that factor.
const LEFT: [f64; 16] = [0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.5, 15.0, 20.0, 40.0, 80.0];
const OPERATIONS: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 96.0];

/// Installs the recorder. Do this before the first lock is requested.
fn install() -> Result<PrometheusHandle, BuildError> {
    let exporter = exporter()?.install_recorder()?;
    names::describe();
    Ok(exporter)
}

fn exporter() -> Result<PrometheusBuilder, BuildError> {
    let of = |name: &str| Matcher::Full(name.to_owned());
    PrometheusBuilder::new()
        .set_buckets_for_metric(of(names::WAIT), &LONG)?
        .set_buckets_for_metric(of(names::HOLD), &LONG)?
        .set_buckets_for_metric(of(names::RENEWAL), &QUICK)?
        .set_buckets_for_metric(of(names::RENEWAL_LEFT), &LEFT)?
        .set_buckets_for_metric(of(names::BATCH_SIZE), &OPERATIONS)
}

/// Ten workers and four locks, so that there is something to see.
async fn work(locker: Locker, worker: u64) -> Result<(), tenure::Error> {
    loop {
        let guard = locker.lock(format!("job:{}", worker % 4)).ttl(Duration::from_secs(3)).await?;
        sleep(Duration::from_millis(500 + 150 * worker)).await;
        guard.release().await?;
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let exporter = install()?;
    let locker = match std::env::var("REDIS_URL") {
        Ok(url) => Locker::connect(&url).await?,
        Err(_) => Locker::in_memory(),
    };
    for worker in 0..10 {
        tokio::spawn(work(locker.clone(), worker));
    }
    let listener = TcpListener::bind("127.0.0.1:9000").await?;
    println!("http://{}/metrics", listener.local_addr()?);
    let render = get(move || std::future::ready(exporter.render()));
    axum::serve(listener, Router::new().route("/metrics", render)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;
    use std::process::Command;

    use tenure_test_support::Server;

    use super::*;

    /// The names of all time series that begin with `tenure_`.
    fn series(text: &str) -> BTreeSet<&str> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        text.split(|c| !is_name(c)).filter(|word| word.starts_with("tenure_")).collect()
    }

    #[tokio::test]
    async fn alerts_and_dashboard_use_series_that_are_exported_and_the_dashboard_shows_each_metric() {
        let recorder = Box::leak(Box::new(exporter().unwrap().build_recorder()));
        // One thread runs this test and all its tasks.
        let _recording = metrics::set_default_local_recorder(recorder);
        names::describe();
        let server = Server::start();
        let locker = Locker::connect(&server.url()).await.unwrap();
        let guard = locker.lock("k").await.unwrap();
        guard.renew().await.unwrap();
        server.cli(&["DEL", "k"]);
        guard.renew().await.unwrap_err();
        let exported = recorder.handle().render();
        let exported = series(&exported);

        let dashboard: serde_json::Value = serde_json::from_str(include_str!("dashboard.json")).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        let queries = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
        let queries: Vec<_> = queries.map(|target| target["expr"].as_str().unwrap()).collect();
        let (shown, queries) = (queries.join("\n"), queries.len());
        assert!(queries >= 9, "{queries}");
        let alerts = include_str!("alerts.yml");
        for name in series(&shown).iter().chain(&series(alerts)) {
            assert!(exported.contains(name), "{name} is not exported: {exported:?}");
        }
        for name in [
            names::REQUESTS,
            names::WAIT,
            names::WAITING,
            names::HELD,
            names::HOLD,
            names::LOST,
            names::RENEWALS,
            names::RENEWAL,
            names::RENEWAL_LEFT,
            names::BATCH_SIZE,
        ] {
            assert!(shown.contains(name), "the dashboard doesn't show {name}");
        }
        assert_eq!(alerts.matches("- alert: ").count(), 3);
    }

    #[test]
    fn buckets_are_narrow_enough_for_the_alert_of_late_renewals() {
        let wide: Vec<_> = LEFT[1..].windows(2).filter(|pair| pair[1] > 2.0 * pair[0]).collect();
        assert!(LEFT[0] == 0.0 && wide.is_empty(), "{wide:?}");
    }

    #[test]
    #[ignore = "needs promtool, of Debian's package prometheus"]
    fn alerts_fire_when_they_should_and_not_when_all_is_well() {
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("prometheus/alerts_test.yml");
        let output =
            Command::new("promtool").args(["test", "rules"]).arg(rules).output().expect("promtool is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
