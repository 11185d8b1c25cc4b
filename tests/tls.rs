//! Connections over TLS: only to the server that was meant, and never silently without TLS.
//!
//! A program of its own, as it starts itself: `rediss://` trusts the authorities of the system, or those in the file
//! that the environment variable `SSL_CERT_FILE` names, and that is one for a whole process. With both features
//! `rediss://` uses native-tls, else the library that is enabled. A client of the user's own brings its authorities,
//! with either library.

#![cfg(any(feature = "fred", feature = "redis"))]
#![cfg(any(feature = "rustls", feature = "native-tls"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

#[cfg(feature = "fred")]
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

#[cfg(feature = "fred")]
use tenure::fred::prelude::{Builder, ClientLike, Config, ReconnectPolicy};
#[cfg(feature = "fred")]
use tenure::fred::types::config::TlsConnector;
use tenure::{Error, Locker, LockerBuilder};
use tenure_test_support::{Authority, Certificate, Server, eventually, soon};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Certificates of two authorities, one of which is trusted.
struct Certificates {
    trusted: Authority,
    other: Authority,
    _dir: tempfile::TempDir,
}

impl Certificates {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [trusted, other] = ["trusted", "other"].map(|name| Authority::new(dir.path(), name));
        Self { trusted, other, _dir: dir }
    }

    fn good(&self) -> Certificate {
        self.trusted.sign("localhost")
    }

    /// What is wrong, and a certificate with which it is.
    fn bad(&self) -> [(&'static str, Certificate); 3] {
        [
            ("signed by another authority", self.other.sign("localhost")),
            ("for another name", self.trusted.sign("elsewhere.example")),
            ("expired", self.trusted.sign_expired("localhost")),
        ]
    }
}

/// Runs the test of this name again, in a process that trusts an authority by `SSL_CERT_FILE`.
fn in_a_process_that_trusts(certificates: &Certificates, test: &str, url: &str) {
    succeeds(start_in_a_process_that_trusts(certificates, test, url));
}

fn start_in_a_process_that_trusts(certificates: &Certificates, test: &str, url: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("SSL_CERT_FILE", certificates.trusted.certificate())
        .env(URL, url)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn succeeds(process: Child) {
    let output = process.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}

/// Set in such a process: what to connect to.
const URL: &str = "TENURE_TLS_URL";

fn builder() -> LockerBuilder {
    Locker::builder().command_timeout(ms(1_000))
}

/// Locks, renews, waits and releases.
async fn use_locks(locker: &Locker) {
    let guard = soon(locker.lock("k")).await.unwrap();
    guard.renew().await.unwrap();
    let waiter = tokio::spawn(locker.lock("k").into_future());
    tokio::time::sleep(ms(50)).await;
    guard.release().await.unwrap();
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

/// It names the certificate, and no waiting is said to help.
fn assert_says_why(refused: &Error) {
    let told = refused.to_string().to_lowercase();
    assert!(told.contains("certificate"), "{refused}");
    assert!(!refused.is_transient(), "{refused}");
}

#[tokio::test]
async fn a_url_is_connected_to_where_the_system_trusts_the_authority() {
    if let Ok(url) = std::env::var(URL) {
        return use_locks(&builder().connect(&url).await.unwrap()).await;
    }
    let certificates = Certificates::new();
    let (_server, port) = Server::start_tls(&certificates.good());
    let test = "a_url_is_connected_to_where_the_system_trusts_the_authority";
    in_a_process_that_trusts(&certificates, test, &format!("rediss://localhost:{port}"));
}

#[tokio::test]
async fn a_url_is_not_connected_to_where_the_certificate_is_wrong() {
    if let Ok(url) = std::env::var(URL) {
        let refused = soon(builder().connect(&url)).await.unwrap_err();
        return assert_says_why(&refused);
    }
    let certificates = Certificates::new();
    for (what, certificate) in certificates.bad() {
        eprintln!("{what}");
        let (_server, port) = Server::start_tls(&certificate);
        let test = "a_url_is_not_connected_to_where_the_certificate_is_wrong";
        in_a_process_that_trusts(&certificates, test, &format!("rediss://localhost:{port}"));
    }
}

#[tokio::test]
async fn a_server_that_speaks_no_tls_is_not_connected_to_and_sees_no_password() {
    let server = Server::start();
    let url = format!("rediss://:secret@localhost:{}", server.port());
    let started = std::time::Instant::now();
    let refused = soon(builder().connect(&url)).await.unwrap_err();
    assert!(matches!(refused, Error::Redis(_)), "{refused}");
    assert!(started.elapsed() < ms(5_000), "{:?}", started.elapsed());
    assert!(!format!("{refused:?}{refused}").contains("secret"));
}

/// Connectors of the user's own, which trust one authority alone.
#[cfg(feature = "fred")]
fn connectors(authority: &Path) -> Vec<(&'static str, TlsConnector)> {
    let pem = std::fs::read(authority).unwrap();
    let mut connectors = Vec::new();
    #[cfg(feature = "rustls")]
    {
        use tenure::fred::rustls::pki_types::{CertificateDer, pem::PemObject};
        use tenure::fred::rustls::{ClientConfig, RootCertStore};
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
        let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        connectors.push(("rustls", TlsConnector::from(config)));
    }
    #[cfg(feature = "native-tls")]
    {
        use tenure::fred::native_tls::{Certificate, TlsConnector as Native};
        let root = Certificate::from_pem(&pem).unwrap();
        let connector = Native::builder().disable_built_in_roots(true).add_root_certificate(root).build().unwrap();
        connectors.push(("native-tls", TlsConnector::from(connector)));
    }
    connectors
}

/// As README shows it.
#[cfg(feature = "fred")]
async fn connect(port: u16, connector: TlsConnector) -> Locker {
    let config =
        Config { tls: Some(connector.into()), ..Config::from_url(&format!("redis://localhost:{port}")).unwrap() };
    let client =
        Builder::from_config(config).set_policy(ReconnectPolicy::new_exponential(0, 50, 2_000, 2)).build().unwrap();
    soon(client.init()).await.unwrap();
    builder().client(client)
}

#[cfg(feature = "fred")]
#[tokio::test]
async fn a_client_of_the_users_own_brings_its_own_authority() {
    let certificates = Certificates::new();
    let (_server, port) = Server::start_tls(&certificates.good());
    for (library, connector) in connectors(&certificates.trusted.certificate()) {
        eprintln!("{library}");
        use_locks(&connect(port, connector).await).await;
    }
}

#[cfg(feature = "fred")]
#[tokio::test]
async fn a_certificate_that_becomes_wrong_is_told_and_not_waited_out() {
    let certificates = Certificates::new();
    for (what, certificate) in certificates.bad() {
        for (library, connector) in connectors(&certificates.trusted.certificate()) {
            eprintln!("{library}: {what}");
            let (server, port) = Server::start_tls(&certificates.good());
            let locker = connect(port, connector).await;
            use_locks(&locker).await;
            server.replace_certificate(&certificate);
            assert_says_why(&soon(locker.lock("k")).await.unwrap_err());
            // It is put right, and all goes on.
            server.replace_certificate(&certificates.good());
            let guard = eventually("it is used again", async || locker.try_lock("k").await.ok()).await;
            guard.release().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_certificate_that_becomes_wrong_is_told_to_who_connected_by_url() {
    if let Ok(url) = std::env::var(URL) {
        let locker = builder().connect(&url).await.unwrap();
        // Tells that it is connected.
        drop(locker.lock("connected").ttl(ms(60_000)).await.unwrap().into_lease());
        let refused = eventually("it is refused", async || match locker.lock("k").await {
            Ok(guard) => {
                drop(guard.release().await);
                None
            }
            Err(refused) => Some(refused),
        });
        return assert_says_why(&refused.await);
    }
    let certificates = Certificates::new();
    for (what, certificate) in certificates.bad() {
        eprintln!("{what}");
        let (server, port) = Server::start_tls(&certificates.good());
        let test = "a_certificate_that_becomes_wrong_is_told_to_who_connected_by_url";
        let process = start_in_a_process_that_trusts(&certificates, test, &format!("rediss://localhost:{port}"));
        eventually("connected", async || (server.cli(&["EXISTS", "connected"]) == "1").then_some(())).await;
        server.replace_certificate(&certificate);
        succeeds(process);
    }
}
