//! What endangers locks on a server is found there, and only that.

use std::time::Duration;

use tenure::{Diagnosis, Finding, Locker, Severity, Topic};
use tenure_test_support::{Cluster, Sentinel, Server, eventually, soon};

const SAFE: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

async fn diagnose(url: &str) -> Diagnosis {
    let diagnosis = soon(Locker::connect(url).await.unwrap().diagnose()).await.unwrap();
    eprintln!("{diagnosis}");
    diagnosis
}

/// Asserts that this is all that was found. Returns it.
fn only(diagnosis: &Diagnosis, severity: Severity, topic: Topic) -> &Finding {
    let [finding] = &diagnosis.findings[..] else { panic!("{diagnosis:?}") };
    assert_eq!((finding.severity, finding.topic), (severity, topic), "{finding:?}");
    finding
}

#[tokio::test]
async fn nothing_is_found_where_nothing_is_wrong_and_nothing_is_left_behind() {
    assert_eq!(Locker::in_memory().diagnose().await.unwrap(), Diagnosis::default());
    let server = Server::start_with(&SAFE);
    for url in [server.url(), server.unix_url()] {
        let diagnosis = diagnose(&url).await;
        assert_eq!(diagnosis.findings, []);
        let [report] = &diagnosis.servers[..] else { panic!("{diagnosis:?}") };
        assert!(url.ends_with(&report.address) && report.version.is_some(), "{report:?}");
        assert!(report.clock_ahead_ms.is_none_or(|ahead| ahead.abs() < 1_000), "{report:?}");
    }
    assert_eq!(server.cli(&["DBSIZE"]), "0");
}

#[tokio::test]
async fn a_server_that_persists_nothing_or_evicts_keys_is_found_out() {
    let server = Server::start();
    let finding = diagnose(&server.url()).await;
    assert!(only(&finding, Severity::Warning, Topic::Persistence).what.contains("all locks"), "{finding}");
    let evicting = [&SAFE[..], &["--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru"]].concat();
    let server = Server::start_with(&evicting);
    let finding = diagnose(&server.url()).await;
    let told = only(&finding, Severity::Danger, Topic::Memory);
    assert!(told.what.contains("`volatile-lru`") && told.advice.contains("noeviction"), "{told:?}");
    // As text, and as data.
    assert!(finding.to_string().contains("danger (memory): "), "{finding}");
    #[cfg(feature = "serde")]
    {
        let data = serde_json::to_value(&finding).unwrap();
        assert_eq!(data["findings"][0]["severity"], "danger");
        assert_eq!(data["findings"][0]["topic"], "memory");
        assert!(data["servers"][0]["version"].is_string(), "{data}");
    }
}

#[tokio::test]
async fn a_server_that_is_full_and_one_that_is_a_replica_grant_nothing() {
    let server = Server::start_with(&[&SAFE[..], &["--maxmemory", "1", "--maxmemory-policy", "noeviction"]].concat());
    let full = diagnose(&server.url()).await;
    assert!(full.findings.iter().any(|finding| finding.what.contains("OOM")), "{full}");
    let primary = Server::start_with(&SAFE);
    let replica = primary.start_replica();
    let alone = diagnose(&primary.url()).await;
    assert!(only(&alone, Severity::Warning, Topic::Replication).advice.contains("min_replicas(1)"), "{alone}");
    let two = Locker::builder().min_replicas(2).connect(&primary.url()).await.unwrap();
    let two = two.diagnose().await.unwrap();
    assert!(only(&two, Severity::Danger, Topic::Replication).what.contains("1 are connected"), "{two}");
    let follows = diagnose(&replica.url()).await;
    assert_eq!(follows.worst(), Some(Severity::Danger));
    assert!(follows.findings.iter().any(|finding| finding.what.contains("it is a replica")), "{follows}");
}

#[tokio::test]
async fn what_the_user_may_not_do_is_named() {
    let server = Server::start_with(&SAFE);
    let rules = "~app:* ~{app:* &app:* +@all -zadd -config -info -time";
    let rules: Vec<_> = ["ACL", "SETUSER", "app", "on", ">secret"].into_iter().chain(rules.split(' ')).collect();
    assert_eq!(server.cli(&rules), "OK");
    let url = server.url().replace("redis://", "redis://app:secret@");
    let app = Locker::builder().prefix("app:").connect(&url).await.unwrap();
    // No script runs without the time.
    let refused = app.diagnose().await.unwrap();
    assert_eq!(refused.worst(), Some(Severity::Danger), "{refused}");
    server.cli(&["ACL", "SETUSER", "app", "+time", "-pexpire"]);
    let refused = app.diagnose().await.unwrap();
    eprintln!("{refused}");
    let about: Vec<_> = refused.findings.iter().map(|finding| (finding.severity, finding.topic)).collect();
    let permissions =
        [Severity::Danger, Severity::Warning, Severity::Note].map(|severity| (severity, Topic::Permissions));
    assert_eq!(about, permissions, "{refused}");
    assert!(refused.findings[0].advice.contains("+pexpire"), "{refused}");
    assert!(refused.findings[1].advice.contains("`+zadd`"), "{refused}");
    // Other keys than those with the prefix.
    let other = Locker::connect(&url).await.unwrap().diagnose().await.unwrap();
    assert!(other.findings[0].what.contains("NOPERM") && other.worst() == Some(Severity::Danger), "{other}");
}

#[tokio::test]
async fn each_primary_of_a_cluster_is_looked_at_and_its_sentinels_lead_to_one() {
    let cluster = Cluster::start();
    let diagnosis = diagnose(&cluster.url()).await;
    assert!(diagnosis.servers.len() >= 3, "{diagnosis}");
    let persists: Vec<_> =
        diagnosis.findings.iter().filter(|finding| finding.topic == Topic::Persistence).map(|f| &f.server).collect();
    assert!(persists.len() == diagnosis.servers.len() && persists.iter().all(|server| server.is_some()), "{diagnosis}");
    // By the URL of one node.
    let node = diagnose(&cluster.nodes[0].url()).await;
    assert!(node.findings.iter().any(|finding| finding.advice.contains("redis-cluster://")), "{node}");
    let watched = Sentinel::start();
    let diagnosis = diagnose(&watched.url()).await;
    assert!(diagnosis.servers[0].address.contains("Sentinel"), "{diagnosis}");
    assert!(diagnosis.findings.iter().any(|finding| finding.topic == Topic::Replication), "{diagnosis}");
}

#[tokio::test]
async fn each_node_of_a_quorum_is_looked_at_and_those_that_are_away_are_named() {
    let mut servers = [(); 3].map(|()| Server::start());
    let builder = Locker::builder().command_timeout(Duration::from_millis(1_000));
    let locker = builder.clone().quorum(servers.iter().map(Server::url)).await.unwrap();
    let diagnosis = soon(locker.diagnose()).await.unwrap();
    // The restart window covers that they persist nothing.
    assert_eq!((diagnosis.worst(), diagnosis.findings.len()), (Some(Severity::Note), 3), "{diagnosis}");
    let never = builder.restart_window(Duration::ZERO).quorum(servers.iter().map(Server::url)).await.unwrap();
    assert_eq!(soon(never.diagnose()).await.unwrap().worst(), Some(Severity::Danger));
    for (away, worst) in [(0, Severity::Warning), (1, Severity::Danger)] {
        servers[away].kill();
        eventually("it is noticed", async || {
            let diagnosis = soon(locker.diagnose()).await.unwrap();
            let address = format!("127.0.0.1:{}", servers[away].port());
            let is_named = diagnosis
                .findings
                .iter()
                .any(|finding| finding.topic == Topic::Reachability && finding.server.as_deref() == Some(&*address));
            (is_named && diagnosis.worst() == Some(worst)).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_server_that_is_away_is_an_error() {
    let mut server = Server::start();
    let locker = Locker::builder().command_timeout(Duration::from_millis(300)).connect(&server.url()).await.unwrap();
    server.kill();
    assert!(soon(locker.diagnose()).await.unwrap_err().is_transient());
    locker.close().await;
    assert!(matches!(locker.diagnose().await, Err(tenure::Error::Closed)));
}
