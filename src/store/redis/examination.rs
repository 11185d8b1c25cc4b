//! Asks servers for what endangers locks on them.

mod findings;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::AbortOnDropHandle;

pub(super) use self::findings::Circumstances;
use self::findings::{Denied, Facts};
use super::driver::{Connection, NodeConnection, Value};
use super::refusal::normalize;
use super::script::{Call, into_ours};
use super::{RedisStore, line, names, router};
use crate::{Diagnosis, Error, Key, ServerReport};

/// A server that can be asked by itself.
pub(super) struct Peer {
    pub(super) address: String,
    connection: PeerConnection,
}

enum PeerConnection {
    Own(Arc<dyn Connection>),
    Node { node: Arc<dyn NodeConnection>, _driver: AbortOnDropHandle<()> },
}

impl Peer {
    /// Sends one command, once.
    pub(super) async fn ask(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Result<Value, Error> {
        let reply = match &self.connection {
            PeerConnection::Own(connection) => connection.send(command, args, until).await,
            PeerConnection::Node { node, .. } => node.send(command, args, until).await,
        };
        reply.map_err(into_ours)
    }

    async fn text(&self, command: &'static str, args: &[&'static str], until: Instant) -> Option<String> {
        let args = args.iter().map(|&arg| arg.into()).collect();
        let reply = self.ask(command, args, until).await.ok()?;
        reply.to_text().map(std::borrow::Cow::into_owned)
    }

    async fn setting(&self, name: &'static str, until: Instant) -> Option<String> {
        let reply = self.ask("CONFIG", vec!["GET".into(), name.into()], until).await.ok()?;
        let Value::Array(parts) = reply else { return None };
        parts.get(1)?.to_text().map(std::borrow::Cow::into_owned)
    }

    /// Returns the server's clock in ms less ours, and how long the reply took.
    async fn clock(&self, until: Instant) -> Result<(i64, Duration), Error> {
        let (sent, ours) = (Instant::now(), SystemTime::now());
        let reply = self.ask("TIME", Vec::new(), until).await?;
        let took = sent.elapsed();
        let Value::Array(parts) = reply else { return Ok((0, took)) };
        let part = |n: usize| parts.get(n).and_then(Value::as_i64).unwrap_or_default();
        let ours = (ours + took / 2).duration_since(UNIX_EPOCH).unwrap_or_default();
        let ours = i64::try_from(ours.as_millis()).unwrap_or(i64::MAX);
        let theirs = part(0).saturating_mul(1_000).saturating_add(part(1) / 1_000);
        Ok((theirs.saturating_sub(ours), took))
    }

    async fn facts(&self, until: Instant) -> Result<(Facts, ServerReport), Error> {
        let timed = self.clock(until).await;
        let clock = match timed {
            // A server that may not be asked for the time is asked for the rest.
            Err(error) if error.code() != Some("NOPERM") => return Err(error),
            timed => timed.ok(),
        };
        let (ahead, round_trip) = clock.unwrap_or_default();
        let uncertain = i64::try_from(round_trip.as_millis()).unwrap_or(i64::MAX) / 2 + 1;
        let info = self.text("INFO", &[], until).await;
        let cluster_state = match info.as_deref().is_some_and(|info| info.contains("cluster_enabled:1")) {
            true => self.text("CLUSTER", &["INFO"], until).await,
            false => None,
        };
        let facts = Facts {
            may_ask_for_info: info.is_some(),
            info: info.unwrap_or_default(),
            save: self.setting("save", until).await,
            appendfsync: self.setting("appendfsync", until).await,
            cluster_state,
            clock_ahead_ms: clock.map(|_| ahead),
        };
        let clock_ahead_ms = clock.map(|_| ahead).filter(|ahead| ahead.abs() > uncertain);
        let report =
            ServerReport { address: self.address.clone(), version: facts.version(), round_trip, clock_ahead_ms };
        Ok((facts, report))
    }
}

impl RedisStore {
    /// Returns the servers: one, or the primaries of a cluster; those that can't be reached with the reason.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where the caller's connection to a cluster doesn't tell its nodes.
    pub(super) async fn peers(&self, until: Instant) -> Result<Vec<Result<Peer, (String, Error)>>, Error> {
        let connection = &self.server().connection;
        let Some(nodes) = connection.nodes() else {
            if connection.is_cluster() {
                return Err(Error::Unsupported("this connection doesn't tell the nodes of its cluster; use its URL"));
            }
            let (address, connection) = (connection.address(), PeerConnection::Own(connection.clone()));
            return Ok(vec![Ok(Peer { address, connection })]);
        };
        let mut addresses = nodes.primaries();
        if addresses.is_empty() {
            addresses = nodes.seeds();
        }
        addresses.sort_unstable_by_key(ToString::to_string);
        addresses.dedup();
        let open = addresses.into_iter().map(|node| {
            let opening = nodes.open(&node);
            async move {
                let late = |_| Error::timeout();
                let opened = timeout_at(until, opening).await.map_err(late).and_then(|opened| Ok(opened?));
                let address = node.to_string();
                match (opened, Handle::try_current()) {
                    (Ok((node, ended)), Ok(here)) => {
                        let driver = AbortOnDropHandle::new(here.spawn(ended));
                        Ok(Peer { address, connection: PeerConnection::Node { node, _driver: driver } })
                    }
                    (Err(error), _) => Err((address, error)),
                    (_, Err(_)) => Err((address, Error::NoRuntime)),
                }
            }
        });
        Ok(router::all(open).await)
    }

    pub(super) async fn diagnose(&self, mut around: Circumstances, timeout: Duration) -> Result<Diagnosis, Error> {
        let until = Instant::now() + timeout;
        around.min_replicas = self.server().min_replicas;
        around.is_cluster = self.server().connection.is_cluster();
        let peers = self.peers(until).await?;
        let is_one = peers.len() == 1;
        let examined = router::all(peers.iter().map(|peer| async move {
            match peer {
                Ok(peer) => peer.facts(until).await.map_err(|error| (peer.address.clone(), error)),
                Err((address, error)) => Err((address.clone(), error.clone())),
            }
        }));
        let mut diagnosis = Diagnosis::default();
        for examined in examined.await {
            let found = match examined {
                Err((_, error)) if is_one => return Err(error),
                Err((address, error)) => findings::unreachable(address, &error),
                Ok((facts, report)) => {
                    let server = (!is_one || around.window.is_some()).then(|| report.address.clone());
                    Diagnosis { findings: findings::of(&facts, &around, server.as_deref()), servers: vec![report] }
                }
            };
            diagnosis.extend(found);
        }
        let denied = self.denied(until).await?;
        let server = diagnosis.servers.first().filter(|_| around.window.is_some()).map(|server| server.address.clone());
        let findings = findings::of_permissions(&denied, &around, server.as_deref());
        diagnosis.extend(Diagnosis { servers: Vec::new(), findings });
        Ok(diagnosis)
    }

    /// Finds out what the user may not do, on keys that nobody uses.
    async fn denied(&self, until: Instant) -> Result<Denied, Error> {
        let key = Key::from(format!("tenure-probe-{:016x}", fastrand::u64(..)));
        let name = self.name(&key);
        let [lock, line, alive] = line::lock_and_line(&name);
        let keys = [lock, line, alive, names::grants_of(&name), names::fence_of(&name)];
        let call = Call::new(keys.into_iter(), self.notify(&name));
        let left = until.saturating_duration_since(Instant::now());
        let script = &self.server().scripts.probe;
        let reply = match self.server().run(script, || call.clone(), |_| {}, left).await {
            Ok(reply) => reply.value(),
            Err(error) => Err(error),
        };
        let mut denied = Denied::default();
        match reply {
            Ok(Value::Array(failed)) => {
                let mut parts = failed.iter().map(|part| part.to_text().unwrap_or_default());
                while let (Some(command), Some(error)) = (parts.next(), parts.next()) {
                    denied.add(&command, &normalize(&error));
                }
            }
            Ok(_) => {}
            Err(error) if error.is_refusal() => denied.everything = Some(error),
            Err(error) => return Err(error),
        }
        Ok(denied)
    }
}
