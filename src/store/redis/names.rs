//! The names of keys at the server.

use std::sync::LazyLock;

use fred::bytes::Bytes;
use fred::util::redis_keyslot;

/// The hash slots of a cluster.
const SLOTS: usize = 16384;

/// The name of the fence key that belongs to a lock key, in the same hash slot.
///
/// `k:fence` where `k` has a hash tag of its own, `{k}:fence` where it has none. A key without a tag that can't become
/// one, since it contains a closing brace (`a}b` in braces would have the tag `a`), lends its slot to a stand-in:
/// `{tag}k:fence`.
pub(super) fn fence_of(key: &Bytes) -> Bytes {
    beside(key, b":fence")
}

/// The name of the record of grants that rely on a lock key; made like that of the fence key.
pub(super) fn grants_of(key: &Bytes) -> Bytes {
    beside(key, b":grants")
}

/// The name of the queue for a lock key; made like that of the fence key.
pub(super) fn queue_of(key: &Bytes) -> Bytes {
    beside(key, b":queue")
}

/// The name of the key that says who of that queue is alive.
pub(super) fn alive_of(key: &Bytes) -> Bytes {
    beside(key, b":alive")
}

fn beside(key: &Bytes, what: &[u8]) -> Bytes {
    if has_hash_tag(key) {
        return [&key[..], what].concat().into();
    }
    if !key.contains(&b'}') {
        return [b"{", &key[..], b"}", what].concat().into();
    }
    let tag = TAGS.get(usize::from(redis_keyslot(key))).copied().unwrap_or_default();
    [b"{", &tag[..], b"}", &key[..], what].concat().into()
}

/// Whether the cluster hashes a part of the key only: what stands between its first `{` and the first `}` after that, if
/// anything does. <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags>
fn has_hash_tag(key: &[u8]) -> bool {
    let Some(open) = key.iter().position(|&b| b == b'{') else { return false };
    let inside = key.iter().skip(open + 1).position(|&b| b == b'}');
    inside.is_some_and(|length| length > 0)
}

/// For every slot, four letters that hash to it.
static TAGS: LazyLock<Vec<[u8; 4]>> = LazyLock::new(|| {
    const LETTERS: &[u8; 26] = b"abcdefghijklmnopqrstuvwxyz";
    let letter = |n: usize| LETTERS.get(n % LETTERS.len()).copied().unwrap_or(b'a');
    let mut tags = vec![[b'a'; 4]; SLOTS];
    for n in 0..LETTERS.len().pow(4) {
        let tag = [letter(n), letter(n / 26), letter(n / 26 / 26), letter(n / 26 / 26 / 26)];
        if let Some(known) = tags.get_mut(usize::from(redis_keyslot(&tag))) {
            *known = tag;
        }
    }
    tags
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_and_tagged_keys_have_the_documented_names() {
        assert_eq!(fence_of(&Bytes::from("job")), "{job}:fence");
        assert_eq!(fence_of(&Bytes::from("{user:1}:job")), "{user:1}:job:fence");
    }

    #[test]
    fn every_slot_has_a_stand_in() {
        for (slot, tag) in TAGS.iter().enumerate() {
            assert_eq!(usize::from(redis_keyslot(tag)), slot);
        }
    }

    #[test]
    fn a_fence_key_is_in_the_slot_of_its_lock_key_whatever_braces_it_has() {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..100_000 {
            let key: Bytes = (0..rng.usize(1..9)).map(|_| rng.choice(*b"{}{}ab\xff").unwrap()).collect();
            assert_eq!(redis_keyslot(&fence_of(&key)), redis_keyslot(&key), "{key:?}, seed {seed}");
        }
    }
}
