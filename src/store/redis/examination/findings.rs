//! What the facts about a server mean for locks. No I/O.

use std::time::Duration;

use crate::{Diagnosis, Error, Finding, Severity, Topic};

/// What a server has told.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Facts {
    pub(super) may_ask_for_info: bool,
    /// The reply to `INFO`.
    pub(super) info: String,
    /// `None` where the server may not be asked for its configuration.
    pub(super) save: Option<String>,
    pub(super) appendfsync: Option<String>,
    /// The reply to `CLUSTER INFO`, if it is a node of a cluster.
    pub(super) cluster_state: Option<String>,
    /// Its clock less ours.
    pub(super) clock_ahead_ms: Option<i64>,
}

/// What the locks are for, and how they are kept.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Circumstances {
    pub(in super::super) min_replicas: usize,
    /// The locker has the URL of a cluster.
    pub(in super::super) is_cluster: bool,
    /// The restart window, if the server is a node of a quorum.
    pub(in super::super) window: Option<Duration>,
}

/// What the user may not do.
#[derive(Debug, Default)]
pub(super) struct Denied {
    /// Scripts, or scripts on such keys.
    pub(super) everything: Option<Error>,
    /// Commands without which there are no locks.
    needed: Vec<String>,
    /// Commands without which waiters poll.
    for_waiting: Vec<String>,
    /// Commands that fail although they are permitted, and how: the server is out of memory, say.
    failing: Vec<(String, String)>,
}

impl Denied {
    /// Notes a command that the probe could not run.
    pub(super) fn add(&mut self, command: &str, error: &str) {
        let (command, list) = match command.strip_prefix('-') {
            Some(command) => (command, &mut self.for_waiting),
            None => (command, &mut self.needed),
        };
        if error.starts_with("NOPERM") {
            if !list.iter().any(|known| known == command) {
                list.push(command.to_owned());
            }
        } else if self.failing.iter().all(|(_, known)| known != error) {
            self.failing.push((command.to_owned(), error.to_owned()));
        }
    }
}

/// More than the time on any two well-kept servers differs by.
const CLOCKS_DIFFER: i64 = 1_000;
/// The oldest servers that the tests run on.
const OLDEST: [(&str, [u32; 2]); 2] = [("Redis", [6, 2]), ("Valkey", [7, 2])];

impl Facts {
    fn field(&self, name: &str) -> Option<&str> {
        let mut lines = self.info.lines().filter_map(|line| line.trim_end().split_once(':'));
        lines.find_map(|(field, value)| (field == name).then_some(value))
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.field(name)?.parse().ok()
    }

    fn product(&self) -> Option<(&'static str, &str)> {
        let valkey = self.field("valkey_version").map(|version| ("Valkey", version));
        valkey.or_else(|| Some(("Redis", self.field("redis_version")?)))
    }

    pub(super) fn version(&self) -> Option<String> {
        self.product().map(|(product, version)| format!("{product} {version}"))
    }
}

/// Collects findings about one server.
struct Findings<'a> {
    all: Vec<Finding>,
    server: Option<&'a str>,
}

impl Findings<'_> {
    fn add(&mut self, severity: Severity, topic: Topic, what: impl Into<String>, advice: impl Into<String>) {
        let (what, advice, server) = (what.into(), advice.into(), self.server.map(str::to_owned));
        self.all.push(Finding { severity, topic, server, what, advice });
    }
}

/// Returns what the facts mean.
pub(super) fn of(facts: &Facts, around: &Circumstances, server: Option<&str>) -> Vec<Finding> {
    let mut findings = Findings { all: Vec::new(), server };
    if facts.may_ask_for_info {
        memory(facts, &mut findings);
        persistence(facts, around, &mut findings);
        replication(facts, around, &mut findings);
        version(facts, &mut findings);
        cluster(facts, around, &mut findings);
    } else {
        findings.add(
            Severity::Note,
            Topic::Permissions,
            "the user may not ask for INFO, so eviction, persistence and replicas are unknown",
            "permit `+info` and `+config|get` to this user, or run this as an administrator",
        );
    }
    clock(facts, around, &mut findings);
    findings.all
}

fn memory(facts: &Facts, findings: &mut Findings<'_>) {
    let (limit, policy) = (facts.number("maxmemory").unwrap_or(0), facts.field("maxmemory_policy").unwrap_or(""));
    if limit == 0 {
        return;
    }
    let megabytes = limit >> 20;
    match policy {
        "noeviction" | "" => {
            if facts.number("used_memory").is_some_and(|used| used > limit / 10 * 9) {
                findings.add(
                    Severity::Warning,
                    Topic::Memory,
                    format!("more than 90 % of its {megabytes} MB are in use: once they are full, no lock is granted"),
                    "raise `maxmemory`, or give locks a server of their own",
                );
            }
        }
        _ => {
            let first =
                if policy.starts_with("volatile") { ", keys with a ttl first, as every lock has one" } else { "" };
            let evicted = facts.number("evicted_keys").unwrap_or(0);
            findings.add(
                Severity::Danger,
                Topic::Memory,
                format!(
                    "the policy `{policy}` evicts keys when its {megabytes} MB are full{first}: held locks are lost, \
                     and others get them before their holders notice ({evicted} keys evicted so far)"
                ),
                "set `maxmemory-policy noeviction`, or give locks a server of their own",
            );
        }
    }
}

fn persistence(facts: &Facts, around: &Circumstances, findings: &mut Findings<'_>) {
    let has_log = facts.field("aof_enabled") == Some("1");
    let syncs = facts.appendfsync.as_deref();
    let saves = facts.save.as_deref().is_some_and(|save| !save.trim().is_empty());
    let forgets = match (has_log, syncs) {
        (true, Some("always")) => None,
        (true, Some("no")) => Some("what the system has not written yet, up to half a minute"),
        (true, Some(_)) => Some("up to the last second, with `appendfsync everysec`"),
        (true, None) => return,
        (false, _) if saves => Some("everything since its last snapshot, and brings back what was released since then"),
        (false, _) => Some("all locks, as nothing is written to disk"),
    };
    if facts.field("aof_last_write_status").is_some_and(|status| status != "ok") {
        findings.add(
            Severity::Danger,
            Topic::Persistence,
            "the last write to its append-only file failed, so it refuses further writes: no lock is granted",
            "look at its disk and its log",
        );
    }
    if facts.field("loading") == Some("1") {
        findings.add(
            Severity::Warning,
            Topic::Persistence,
            "it is loading its data: until that is done, no lock is granted",
            "wait",
        );
    }
    let Some(forgets) = forgets else { return };
    let what = format!("a restart forgets {forgets}");
    match around.window {
        Some(window) if !window.is_zero() => findings.add(
            Severity::Note,
            Topic::Persistence,
            format!("{what}; after a restart this node doesn't vote for {} s", window.as_secs()),
            "nothing: the restart window covers it",
        ),
        Some(_) => findings.add(
            Severity::Danger,
            Topic::Persistence,
            format!("{what}, although the locker takes it for a node that never forgets: two may hold a lock then"),
            "set `appendonly yes` and `appendfsync always`, or a restart window",
        ),
        None => findings.add(
            Severity::Warning,
            Topic::Persistence,
            format!("{what}: another may get a lock before its holder notices. Fencing tokens go on growing"),
            "set `appendonly yes` and `appendfsync always`, check fencing tokens where it matters, or use a quorum",
        ),
    }
}

fn replication(facts: &Facts, around: &Circumstances, findings: &mut Findings<'_>) {
    if facts.field("role") == Some("slave") {
        findings.add(
            Severity::Danger,
            Topic::Replication,
            "it is a replica: it refuses every lock",
            "connect to its primary, by its own URL or through Sentinels",
        );
        return;
    }
    let replicas = facts.number("connected_slaves").unwrap_or(0);
    let needed = u64::try_from(around.min_replicas).unwrap_or(u64::MAX);
    if needed > replicas {
        findings.add(
            Severity::Danger,
            Topic::Replication,
            format!(
                "{needed} replicas have to acknowledge each lock, and {replicas} are connected: no lock is granted"
            ),
            "connect the others, or set a smaller `min_replicas`",
        );
    } else if replicas > 0 && around.window.is_some() {
        findings.add(
            Severity::Warning,
            Topic::Replication,
            format!(
                "{replicas} replicas follow this node: if one of them is promoted, the node forgets what it granted"
            ),
            "let nothing fail over to or from a node of a quorum; use more nodes instead",
        );
    } else if replicas > 0 && around.is_cluster {
        findings.add(
            Severity::Warning,
            Topic::Replication,
            "a failover forgets the locks that its replica doesn't have yet: another may get them at once",
            "check fencing tokens where it matters, or use a quorum of servers outside of the cluster",
        );
    } else if replicas > 0 && needed == 0 {
        findings.add(
            Severity::Warning,
            Topic::Replication,
            format!(
                "{replicas} replicas follow it, and `min_replicas` is not set: a failover forgets the locks that the \
                 new primary doesn't have yet"
            ),
            format!("set `min_replicas({replicas})`, so that locks are granted once all of them have them"),
        );
    } else if replicas > needed {
        findings.add(
            Severity::Note,
            Topic::Replication,
            format!("{needed} of {replicas} replicas have to acknowledge each lock: another one may be promoted"),
            "check fencing tokens where it matters, or have all of them acknowledge",
        );
    }
}

fn version(facts: &Facts, findings: &mut Findings<'_>) {
    let Some((product, version)) = facts.product() else { return };
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let number = [numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)];
    let oldest = OLDEST.iter().find(|(name, _)| *name == product).map_or([0, 0], |(_, oldest)| *oldest);
    if number < oldest {
        findings.add(
            Severity::Warning,
            Topic::Version,
            format!("tenure is not tested on {product} {version}"),
            format!("use {product} {}.{} or later", oldest[0], oldest[1]),
        );
    }
}

fn cluster(facts: &Facts, around: &Circumstances, findings: &mut Findings<'_>) {
    let is_node = facts.field("cluster_enabled") == Some("1");
    if is_node && !around.is_cluster {
        findings.add(
            Severity::Danger,
            Topic::Cluster,
            "it is a node of a cluster, and the URL is that of a single server: most locks are refused with MOVED",
            "use a `redis-cluster://` URL",
        );
    }
    if !is_node || !around.is_cluster {
        return;
    }
    let state = facts.cluster_state.as_deref().unwrap_or_default();
    if !state.is_empty() && !state.contains("cluster_state:ok") {
        findings.add(
            Severity::Danger,
            Topic::Cluster,
            "it says that the cluster is down: no lock is granted there",
            "look at `CLUSTER NODES` for what is missing",
        );
    }
}

fn clock(facts: &Facts, around: &Circumstances, findings: &mut Findings<'_>) {
    let Some(ahead) = facts.clock_ahead_ms else { return };
    let off = ahead.unsigned_abs();
    if ahead.abs() <= CLOCKS_DIFFER {
        return;
    }
    let way = if ahead > 0 { "ahead of" } else { "behind" };
    let window = around.window.filter(|window| !window.is_zero());
    if window.is_some_and(|window| u128::from(off) > window.as_millis() / 2) {
        findings.add(
            Severity::Warning,
            Topic::Clock,
            format!("its clock is {off} ms {way} ours, much of the restart window: rounds may have to be repeated"),
            "set the clocks by NTP",
        );
    } else {
        findings.add(
            Severity::Note,
            Topic::Clock,
            format!(
                "its clock is {off} ms {way} ours, or ours is wrong. Locks need no more than that both run at the same \
                 speed; but if a server whose clock is behind takes over, fencing tokens don't grow for that long"
            ),
            "set the clocks by NTP",
        );
    }
}

/// Returns what it means that a server could not be asked.
pub(super) fn unreachable(address: String, error: &Error) -> Diagnosis {
    let finding = Finding {
        severity: Severity::Danger,
        topic: Topic::Reachability,
        server: Some(address),
        what: format!("it could not be asked: {error}"),
        advice: "locks whose keys are on this server can't be obtained or renewed; look at the server".to_owned(),
    };
    Diagnosis { servers: Vec::new(), findings: vec![finding] }
}

/// Returns what it means that the user may not do some things.
pub(super) fn of_permissions(denied: &Denied, around: &Circumstances, server: Option<&str>) -> Vec<Finding> {
    let mut findings = Findings { all: Vec::new(), server };
    let rules = |commands: &[String]| {
        let rules: Vec<_> = commands.iter().map(|command| format!("+{}", command.to_lowercase())).collect();
        rules.join(" ")
    };
    const SECTION: &str = "the section `Permissions` of the README lists the rules";
    if let Some(error) = &denied.everything {
        findings.add(
            Severity::Danger,
            Topic::Permissions,
            format!("it refuses the script of a lock: {error}"),
            format!("permit `+eval +evalsha`, and the keys with the locker's prefix: {SECTION}"),
        );
    }
    if !denied.needed.is_empty() {
        findings.add(
            Severity::Danger,
            Topic::Permissions,
            format!("the user may not run {}: no lock is granted", denied.needed.join(", ")),
            format!("permit `{}`: {SECTION}", rules(&denied.needed)),
        );
    }
    // A quorum has no line.
    let for_waiting: Vec<_> = match around.window {
        Some(_) => denied.for_waiting.iter().filter(|command| command.contains("PUB")).cloned().collect(),
        None => denied.for_waiting.clone(),
    };
    if !for_waiting.is_empty() {
        findings.add(
            Severity::Warning,
            Topic::Permissions,
            format!("the user may not run {}: waiters check every second, and not in order", for_waiting.join(", ")),
            format!("permit `{}`, and the channels with the locker's prefix: {SECTION}", rules(&for_waiting)),
        );
    }
    for (command, error) in &denied.failing {
        findings.add(
            Severity::Danger,
            Topic::Reachability,
            format!("it refuses {command}: {error}"),
            "until that is solved, no lock is granted",
        );
    }
    findings.all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(info: &[&str]) -> Facts {
        let info = info.join("\r\n");
        Facts { may_ask_for_info: true, info, save: Some(String::new()), ..Facts::default() }
    }

    fn found(facts: &Facts, around: &Circumstances) -> Vec<(Severity, Topic)> {
        of(facts, around, None).into_iter().map(|finding| (finding.severity, finding.topic)).collect()
    }

    const SAFE: [&str; 5] =
        ["redis_version:7.0.15", "aof_enabled:1", "role:master", "connected_slaves:0", "maxmemory:0"];

    fn safe() -> Facts {
        Facts { appendfsync: Some("always".to_owned()), clock_ahead_ms: Some(-3), ..facts(&SAFE) }
    }

    #[test]
    fn nothing_is_found_on_a_safe_server() {
        assert_eq!(found(&safe(), &Circumstances::default()), []);
    }

    #[test]
    fn each_danger_is_found() {
        let plain = Circumstances::default();
        let with = |more: &[&str]| Facts { info: [more, &SAFE[..]].concat().join("\n"), ..safe() };
        let node = |window| Circumstances { window: Some(Duration::from_secs(window)), ..plain.clone() };
        let replicas = |min_replicas| Circumstances { min_replicas, ..plain.clone() };
        for (facts, around, severity, topic) in [
            (with(&["maxmemory:9000000", "maxmemory_policy:volatile-lru"]), &plain, Severity::Danger, Topic::Memory),
            (with(&["maxmemory:9000000", "maxmemory_policy:allkeys-lru"]), &plain, Severity::Danger, Topic::Memory),
            (
                with(&["maxmemory:1000", "maxmemory_policy:noeviction", "used_memory:950"]),
                &plain,
                Severity::Warning,
                Topic::Memory,
            ),
            (with(&["aof_enabled:0"]), &plain, Severity::Warning, Topic::Persistence),
            (Facts { appendfsync: Some("everysec".into()), ..safe() }, &plain, Severity::Warning, Topic::Persistence),
            (with(&["aof_enabled:0"]), &node(60), Severity::Note, Topic::Persistence),
            (with(&["aof_enabled:0"]), &node(0), Severity::Danger, Topic::Persistence),
            (with(&["aof_last_write_status:err"]), &plain, Severity::Danger, Topic::Persistence),
            (with(&["loading:1"]), &plain, Severity::Warning, Topic::Persistence),
            (with(&["role:slave"]), &plain, Severity::Danger, Topic::Replication),
            (with(&["connected_slaves:2"]), &plain, Severity::Warning, Topic::Replication),
            (with(&["connected_slaves:2"]), &replicas(1), Severity::Note, Topic::Replication),
            (with(&["connected_slaves:1"]), &replicas(2), Severity::Danger, Topic::Replication),
            (with(&["connected_slaves:1"]), &node(60), Severity::Warning, Topic::Replication),
            (with(&["redis_version:5.0.7"]), &plain, Severity::Warning, Topic::Version),
            (with(&["cluster_enabled:1"]), &plain, Severity::Danger, Topic::Cluster),
            (
                Facts { cluster_state: Some("cluster_state:fail".into()), ..with(&["cluster_enabled:1"]) },
                &Circumstances { is_cluster: true, ..plain.clone() },
                Severity::Danger,
                Topic::Cluster,
            ),
            (Facts { clock_ahead_ms: Some(5_000), ..safe() }, &plain, Severity::Note, Topic::Clock),
            (Facts { clock_ahead_ms: Some(-40_000), ..safe() }, &node(60), Severity::Warning, Topic::Clock),
            (Facts::default(), &plain, Severity::Note, Topic::Permissions),
        ] {
            assert_eq!(found(&facts, around), [(severity, topic)], "{:?} {around:?}", facts.info);
        }
    }

    #[test]
    fn what_is_not_permitted_is_named_with_its_rule() {
        let mut denied = Denied::default();
        for (command, error) in [
            ("SET", "NOPERM no"),
            ("SET", "NOPERM no"),
            ("-ZADD", "NOPERM no"),
            ("DEL", "OOM command not allowed"),
            ("PEXPIRE", "OOM command not allowed"),
        ] {
            denied.add(command, error);
        }
        let found = of_permissions(&denied, &Circumstances::default(), None);
        let texts: Vec<_> = found.iter().map(|finding| (finding.severity, finding.advice.as_str())).collect();
        assert_eq!(texts.len(), 3, "{found:?}");
        assert!(texts[0].0 == Severity::Danger && texts[0].1.contains("`+set`"), "{texts:?}");
        assert!(texts[1].0 == Severity::Warning && texts[1].1.contains("`+zadd`"), "{texts:?}");
        assert!(found[2].what.contains("OOM"), "{found:?}");
    }
}
