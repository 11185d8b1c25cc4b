//! What a lock's life looks like through `tracing`, and that `docs::events` documents every event. A program of its
//! own, as `tracing` remembers for the whole process which events anybody listens to: tests beside this one, which
//! listen to none, could silence it.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenure::{Locker, Loss};
use tenure_test_support::{Server, eventually};
use tracing::Instrument;
use tracing_subscriber::fmt::MakeWriter;

/// What was written, for all to read.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn every_step_is_told_with_its_key_and_without_its_token() {
    let log = Log::default();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false).with_writer(log.clone());
    // One thread runs this test and all its tasks.
    let _told = tracing::subscriber::set_default(subscriber.finish());
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();

    let guard = locker.lock("observed").renew_every(Duration::from_millis(20)).await.unwrap();
    let token = guard.token().as_str().to_owned();
    assert!(locker.try_lock("observed").await.is_err());
    eventually("renewed", async || log.text().contains("renewed").then_some(())).await;
    server.cli(&["DEL", "observed"]);
    assert_eq!(guard.lost().await, Loss::Missing);
    let guard = locker.lock("observed").ttl(Duration::from_millis(600)).await.unwrap();
    server.freeze();
    assert_eq!(guard.lost().await, Loss::Expired);
    eventually("the loss is logged", async || log.text().contains("cause=redis: ").then_some(())).await;
    server.thaw();
    locker.lock("observed").await.unwrap().release().await.unwrap();
    drop(locker.lock("observed").await.unwrap());
    locker.close().await;

    let text = log.text();
    for expected in [
        "tenure.obtain{key=observed ttl=30s}",
        "obtained",
        "waited=",
        "attempts=1",
        "remaining=",
        "held by another",
        "tenure.keep{key=observed}",
        "lost",
        "loss=its key is gone",
        "released",
        "released in the background",
    ] {
        assert!(text.contains(expected), "{expected} in:\n{text}");
    }
    assert!(!text.contains(&token));
}

#[cfg(feature = "metrics")]
#[tokio::test]
async fn the_operations_of_many_tasks_share_calls_as_the_batch_size_shows() {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let recorder: &'static DebuggingRecorder = Box::leak(Box::default());
    // One thread runs this test and all its tasks.
    let _recorded = metrics::set_default_local_recorder(recorder);
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let each = (0..200).map(|i| {
        let locker = locker.clone();
        tokio::spawn(async move { locker.lock(format!("k{i}")).await.unwrap().release().await.unwrap() })
    });
    for task in each.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    let recorded = recorder.snapshotter().snapshot().into_vec();
    let (.., value) = recorded.into_iter().find(|(key, ..)| key.key().name() == tenure::metrics::BATCH_SIZE).unwrap();
    let DebugValue::Histogram(sizes) = value else { panic!("{value:?}") };
    let sizes: Vec<f64> = sizes.into_iter().map(|size| size.into_inner()).collect();
    assert!(sizes.iter().sum::<f64>() >= 400.0, "each lock and each release is in a call: {sizes:?}");
    assert!(sizes.iter().any(|&size| size > 20.0), "and not in one of its own: {sizes:?}");
}

#[tokio::test]
async fn at_level_info_nothing_is_told_of_locks_that_are_well_and_a_loss_is_told_by_its_name() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).with_ansi(false);
    let _told = tracing::subscriber::set_default(subscriber.with_writer(log.clone()).finish());
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("well").renew_every(Duration::from_millis(20)).await.unwrap();
    assert!(locker.try_lock("well").await.is_err());
    let deadline = guard.deadline();
    eventually("renewed", async || (guard.deadline() > deadline).then_some(())).await;
    guard.release().await.unwrap();
    drop(locker.lock("well").await.unwrap());
    locker.lock("well").await.unwrap().release().await.unwrap();
    assert_eq!(log.text(), "");
    let guard = locker.lock("ill").renew_every(Duration::from_millis(20)).await.unwrap();
    server.cli(&["DEL", "ill"]);
    assert_eq!(guard.lost().await, Loss::Missing);
    let told = eventually("told", async || Some(log.text()).filter(|text| !text.is_empty())).await;
    assert!(told.contains("WARN tenure.keep{key=ill}: tenure.lost: lost"), "{told}");
}

#[tokio::test]
async fn what_is_told_of_a_lock_is_told_in_the_span_of_its_caller() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(false);
    let _told = tracing::subscriber::set_default(subscriber.with_writer(log.clone()).finish());
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let obtain = async || locker.lock("ours").renew_every(Duration::from_millis(20)).await.unwrap();
    let guard = obtain().instrument(tracing::info_span!("order", id = 7)).await;
    let deadline = guard.deadline();
    eventually("renewed", async || (guard.deadline() > deadline).then_some(())).await;
    server.cli(&["DEL", "ours"]);
    assert_eq!(guard.lost().await, Loss::Missing);
    let lease = locker.lock("left").await.unwrap().into_lease();
    let adopt = async || locker.adopt(lease.clone()).await.unwrap();
    let adopted = adopt().instrument(tracing::info_span!("night", id = 8)).await;
    server.cli(&["DEL", "left"]);
    adopted.renew().await.unwrap_err();
    let nobodys = obtain().await;
    server.cli(&["DEL", "ours"]);
    assert_eq!(nobodys.lost().await, Loss::Missing);
    for expected in [
        "DEBUG order{id=7}:tenure.obtain{key=ours ttl=30s}: tenure.obtained: ",
        "DEBUG order{id=7}:tenure.keep{key=ours}: tenure.renewed: ",
        " WARN order{id=7}:tenure.keep{key=ours}: tenure.lost: ",
        " WARN night{id=8}:tenure.keep{key=left}: tenure.lost: ",
        " WARN tenure.keep{key=ours}: tenure.lost: ",
    ] {
        eventually(expected, async || log.text().contains(expected).then_some(())).await;
    }
}

/// An event or a span: its levels, and its fields. Of an event that the crate emits in several places, all of them.
type Table = BTreeMap<String, (BTreeSet<String>, BTreeSet<String>)>;

#[test]
fn every_event_is_in_the_table_of_events_and_that_has_no_other() {
    let (documented, emitted) = (documented(), emitted());
    for (name, found) in &emitted {
        let Some(told) = documented.get(name) else { panic!("{name} is not in the table in src/docs/events.rs") };
        assert_eq!(told, found, "{name}: levels and fields in the table (left), and in the code");
    }
    let unknown: Vec<_> = documented.keys().filter(|&name| !emitted.contains_key(name)).collect();
    assert!(unknown.is_empty(), "in the table in src/docs/events.rs, and nothing emits them: {unknown:?}");
    // Or nothing was read.
    assert!(emitted.contains_key("tenure.lost") && emitted.contains_key("tenure.keep"), "{emitted:?}");
}

/// The rows of the table: `| event | level | fields | meaning |`.
fn documented() -> Table {
    let mut table = Table::new();
    let list = |cell: &str| {
        let entries = cell.split(',').map(|entry| entry.trim().trim_matches('`').to_owned());
        entries.filter(|entry| !entry.is_empty()).collect::<BTreeSet<_>>()
    };
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/docs/events.rs")).unwrap();
    for row in page.lines().filter(|line| line.starts_with("//! | `tenure.")) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let [_, name, levels, fields, _meaning, _] = cells[..] else { panic!("not four cells: {row}") };
        let before = table.insert(name.trim_matches('`').to_owned(), (list(levels), list(fields)));
        assert!(before.is_none(), "{name} has two rows");
    }
    table
}

/// What the macros of `tracing` are called with, as the sources have it: `warn!(name: "tenure.lost", key = …, "lost")`
/// and `info_span!("tenure.keep", key = …)`.
fn emitted() -> Table {
    let mut table = Table::new();
    let mut folders = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = fs::read_to_string(&path).unwrap();
                // Not the table itself, nor other comments.
                let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
                read_macros(&code.collect::<Vec<_>>().join("\n"), &mut table);
            }
        }
    }
    table
}

fn read_macros(code: &str, table: &mut Table) {
    for (at, _) in code.match_indices("\"tenure.") {
        let call = code[..at].rfind("!(").unwrap();
        let before = &code[..call];
        let name_of_macro = &before[before.rfind(|c: char| !c.is_alphanumeric() && c != '_').unwrap() + 1..];
        let level = match name_of_macro.strip_suffix("_span") {
            Some(level) => format!("{level} span"),
            None => name_of_macro.to_owned(),
        };
        let levels = ["error", "warn", "info", "debug", "trace"];
        assert!(levels.iter().any(|known| level.starts_with(known)), "{level}: a name outside of an event or a span?");
        let arguments = arguments(&code[call + 2..]);
        let named = arguments.iter().position(|argument| argument.contains("\"tenure.")).unwrap();
        let name = arguments[named].split('"').nth(1).unwrap().to_owned();
        let fields = arguments[named + 1..].iter().filter(|argument| !argument.starts_with('"')).map(|argument| {
            let field = argument.split_once('=').map_or(argument.as_str(), |(field, _)| field);
            field.trim().trim_start_matches(['%', '?']).to_owned()
        });
        let entry = table.entry(name).or_default();
        entry.0.insert(level);
        entry.1.extend(fields);
    }
}

/// The arguments of a call, up to its closing parenthesis.
fn arguments(code: &str) -> Vec<String> {
    let (mut all, mut depth, mut is_text) = (vec![String::new()], 0, false);
    let mut chars = code.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' if is_text => drop(chars.next()),
            '"' => is_text = !is_text,
            '(' if !is_text => depth += 1,
            ')' if !is_text && depth == 0 => break,
            ')' if !is_text => depth -= 1,
            ',' if !is_text && depth == 0 => {
                all.push(String::new());
                continue;
            }
            _ => {}
        }
        all.last_mut().unwrap().push(c);
    }
    all.into_iter().map(|argument| argument.trim().to_owned()).filter(|argument| !argument.is_empty()).collect()
}
