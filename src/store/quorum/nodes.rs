//! Checks which nodes can form a quorum, and connects to them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::identity::{Identities, Identity};
use crate::report::warn;
use crate::store::node::Node;
use crate::store::redis::url::{self, Servers, Target};
use crate::store::redis::{Driver, RedisStore};
use crate::{Error, NodeError};

/// How long to wait for the other nodes once a majority is connected.
const GRACE: Duration = Duration::from_millis(250);

/// A node, and the identity of its server, if that can be asked.
pub(crate) struct Connected {
    pub(super) address: String,
    pub(super) node: Arc<dyn Node>,
    pub(super) identity: Option<Arc<Identity>>,
}

impl From<(String, Arc<dyn Node>)> for Connected {
    fn from((address, node): (String, Arc<dyn Node>)) -> Self {
        Self { address, node, identity: None }
    }
}

/// Connects to at least a majority of the nodes at these URLs, and to the others as they come up.
///
/// # Errors
///
/// [`Error::InvalidNodes`] for nodes that can form no quorum, [`Error::InvalidUrl`] for a URL that is wrong, and
/// [`Error::Quorum`] if no majority could be connected within `timeout`.
pub(crate) async fn connect(
    driver: Driver,
    urls: &[String],
    prefix: &str,
    timeout: Duration,
    nodes_never_forget: bool,
    fence_ttl: Duration,
) -> Result<Vec<Connected>, Error> {
    let targets = check(urls)?;
    let databases: Vec<u8> = targets.iter().map(|(_, target)| target.database.unwrap_or(0)).collect();
    let mut nodes: Vec<(String, Arc<RedisStore>)> = Vec::with_capacity(targets.len());
    for (address, target) in targets {
        let store = RedisStore::open_lazily(driver, &target, prefix.to_owned(), timeout)?.with_fence_ttl(fence_ttl);
        nodes.push((address, Arc::new(store)));
    }
    let stores: Vec<Arc<RedisStore>> = nodes.iter().map(|(_, node)| node.clone()).collect();

    let all = Arc::<Identities>::default();
    let nodes: Vec<Connected> = (0..)
        .zip(nodes)
        .zip(databases)
        .map(|((place, (address, node)), database)| {
            let identity = Identity::new(&all, place, address.clone(), database, node.clone(), nodes_never_forget);
            Connected { address, node, identity: Some(identity) }
        })
        .collect();

    let needed = nodes.len() / 2 + 1;
    let mut connecting = JoinSet::new();
    for (place, node) in stores.into_iter().enumerate() {
        let identity = nodes.get(place).and_then(|node| node.identity.clone());
        connecting.spawn(async move {
            let ready = node.ready(timeout).await;
            if let (Ok(()), Some(identity)) = (&ready, &identity) {
                // If it can't identify itself yet, it is asked again before anything is sent to it.
                drop(identity.identify(timeout).await);
            }
            (place, ready)
        });
    }
    let (mut connected, mut failed) = (0, Vec::new());
    let mut silent: BTreeSet<usize> = (0..nodes.len()).collect();
    let mut until = Instant::now() + timeout * 2;
    while let Ok(Some(ended)) = timeout_at(until, connecting.join_next()).await {
        let Ok((place, ended)) = ended else { continue };
        silent.remove(&place);
        let Some(Connected { address, identity, .. }) = nodes.get(place) else { continue };
        match ended {
            Ok(()) => {
                connected += 1;
                if identity.as_ref().is_some_and(|identity| identity.twin().is_some()) {
                    return Err(Error::InvalidNodes(
                        "two of their addresses lead to one server, which would have two votes",
                    ));
                }
            }
            Err(error) => {
                warn!(name: "tenure.node_away", node = %address, %error, "could not connect to the node; still trying");
                failed.push(NodeError { address: address.clone(), error });
            }
        }
        if connected == needed {
            until = until.min(Instant::now() + GRACE);
        }
        if failed.len() > nodes.len() - needed {
            return Err(Error::Quorum { needed, granted: connected, nodes: failed });
        }
    }
    if connected < needed {
        let unheard = silent.into_iter().filter_map(|place| nodes.get(place));
        failed.extend(unheard.map(|node| NodeError { address: node.address.clone(), error: Error::timeout() }));
        return Err(Error::Quorum { needed, granted: connected, nodes: failed });
    }
    Ok(nodes)
}

/// Refuses nodes that can form no quorum. Returns their addresses, which never contain a password.
fn check(urls: &[String]) -> Result<Vec<(String, Target)>, Error> {
    if urls.is_empty() {
        return Err(Error::InvalidNodes("there are none; name an odd number of independent servers"));
    }
    if urls.len() % 2 == 0 {
        return Err(Error::InvalidNodes(
            "their number is even, which tolerates no more failures than one node less; use an odd number",
        ));
    }
    let mut nodes: Vec<(String, Target)> = Vec::with_capacity(urls.len());
    for url in urls {
        let target = url::parse(url)?;
        if matches!(&target.servers, Servers::Cluster(_) | Servers::Sentinels { .. }) {
            return Err(Error::InvalidNodes(
                "a cluster or a server under Sentinels is no node of a quorum: a failover forgets; use plain servers",
            ));
        }
        let address = target.to_string();
        let same = nodes.iter().find(|(other, _)| *other == address);
        match same.map(|(_, other)| other.database.unwrap_or(0) == target.database.unwrap_or(0)) {
            Some(true) => return Err(Error::InvalidNodes("one is named twice, and would have two votes")),
            Some(false) => {
                warn!(
                    name: "tenure.same_node", node = %address,
                    "two databases of one server are no independent nodes"
                );
            }
            None => {}
        }
        nodes.push((address, target));
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(urls: &[&str]) -> Result<Vec<String>, Error> {
        let urls: Vec<String> = urls.iter().map(|&url| url.to_owned()).collect();
        super::check(&urls).map(|nodes| nodes.into_iter().map(|(address, _)| address).collect())
    }

    #[test]
    fn lists_that_make_no_quorum_are_refused() {
        for urls in [
            &[][..],
            &["redis://a", "redis://b"],
            &["redis://a", "redis://b", "redis://a:6379"],
            &["redis://a", "redis://b", "redis://:password@b:6379/0"],
            &["redis-cluster://a", "redis://b", "redis://c"],
            &["redis-sentinel://a:26379?sentinelServiceName=x", "redis://b", "redis://c"],
        ] {
            assert!(matches!(check(urls), Err(Error::InvalidNodes(_))), "{urls:?}");
        }
        for url in ["redis://a:port", "reddis://a", "redis://a?db=3"] {
            assert!(matches!(check(&[url]), Err(Error::InvalidUrl(_))), "{url}");
        }
    }

    #[test]
    fn addresses_show_no_password() {
        let urls = ["redis://user:secret@a:1/2", "redis+unix:///run/redis.sock", "redis://a:1/3"];
        assert_eq!(check(&urls).unwrap(), ["a:1", "/run/redis.sock", "a:1"]);
        assert_eq!(check(&["redis://alone"]).unwrap(), ["alone:6379"]);
    }
}
