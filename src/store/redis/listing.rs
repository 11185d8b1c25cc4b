//! Finds the locks whose keys begin alike, by SCAN: the server goes on serving others meanwhile.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::driver::Value;
use super::examination::Peer;
use super::replies::unexpected;
use super::{RedisStore, names};
use crate::{Error, Key};

/// How many keys the server looks at in each step.
const STEP: &str = "1000";

impl RedisStore {
    /// Returns the keys of strings that begin with the prefix and belong to no other key. Each step takes no longer
    /// than `timeout`.
    pub(super) async fn find_keys(&self, prefix: &[u8], timeout: Duration) -> Result<BTreeSet<Key>, Error> {
        let mut found = BTreeSet::new();
        for peer in self.peers(Instant::now() + timeout).await? {
            let peer = peer.map_err(|(_, error)| error)?;
            self.scan(&peer, prefix, timeout, &mut found).await?;
        }
        Ok(found)
    }

    async fn scan(
        &self,
        peer: &Peer,
        prefix: &[u8],
        timeout: Duration,
        found: &mut BTreeSet<Key>,
    ) -> Result<(), Error> {
        let pattern = pattern(&[self.prefix.as_bytes(), prefix].concat());
        let mut cursor = Bytes::from_static(b"0");
        loop {
            let args = [&cursor[..], b"MATCH", &pattern, b"COUNT", STEP.as_bytes(), b"TYPE", b"string"];
            let args = args.map(Bytes::copy_from_slice).to_vec();
            let reply = peer.ask("SCAN", args, Instant::now() + timeout).await?;
            let Value::Array(parts) = reply else { return Err(unexpected()) };
            let [next, Value::Array(keys)] = &parts[..] else { return Err(unexpected()) };
            for key in keys {
                let Value::Bytes(name) = key else { continue };
                if let Some(key) = name.strip_prefix(self.prefix.as_bytes()).filter(|_| !names::is_beside(name)) {
                    found.insert(Key::from(key));
                }
            }
            match next {
                Value::Bytes(next) if **next != *b"0" => cursor = next.clone(),
                Value::Integer(next) if *next != 0 => cursor = next.to_string().into(),
                _ => return Ok(()),
            }
        }
    }
}

/// Returns the glob that matches what begins with this.
fn pattern(prefix: &[u8]) -> Vec<u8> {
    let mut pattern = Vec::with_capacity(prefix.len() + 1);
    for byte in prefix {
        if matches!(byte, b'*' | b'?' | b'[' | b']' | b'\\') {
            pattern.push(b'\\');
        }
        pattern.push(*byte);
    }
    pattern.push(b'*');
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_special_in_a_glob_is_escaped() {
        assert_eq!(pattern(b"a*b[c]?\\:"), br"a\*b\[c\]\?\\:*");
    }
}
