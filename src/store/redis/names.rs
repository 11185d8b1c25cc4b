//! The names of keys and channels at the server.
//!
//! A key that belongs to a lock key has a name that is made of the lock key and a suffix:
//!
//! 1. It lies in the hash slot of the lock key, so that one script may touch both on a cluster.
//! 2. No two lock keys have the same such name, whatever bytes they are made of.
//!
//! In the table `x` is at least one byte, and has no closing brace.
//!
//! | lock key | example | name | example |
//! | --- | --- | --- | --- |
//! | no hash tag, no `}` | `job` | `{key}suffix` | `{job}:fence` |
//! | `{x}`, then any number of `{}` | `{job}` | `key{}suffix` | `{job}{}:fence` |
//! | any other with a hash tag | `{user:1}:job` | `keysuffix` | `{user:1}:job:fence` |
//! | no hash tag, but a `}` | `a}b` | `{stand-in}keysuffix~` | `{jnhl}a}b:fence~` |
//!
//! The second line leaves the names of the first to the keys without braces: `{job}` would have `{job}:fence`, too.

use std::borrow::Cow;
use std::sync::LazyLock;

use bytes::Bytes;

use super::slot::{hash_tag, slot_of};

/// Returns the name of the fence key, which keeps the last fencing token of a lock key.
pub(super) fn fence_of(key: &Bytes) -> Bytes {
    beside(key, ":fence")
}

/// Returns the name of the record of the grants that rely on a lock key.
pub(super) fn grants_of(key: &Bytes) -> Bytes {
    beside(key, ":grants")
}

/// Returns the name of the line of waiters for a lock key.
pub(super) fn line_of(key: &Bytes) -> Bytes {
    beside(key, ":queue")
}

/// Returns whether the key is in the first line of the table: most are. Then `scripts/pass_on_one.lua` knows the name
/// of its line.
pub(super) fn has_no_brace(key: &[u8]) -> bool {
    !key.iter().any(|byte| matches!(byte, b'{' | b'}'))
}

/// Returns the name of the hash of processes in that line that are alive. `scripts/line.lua` derives it from the
/// line's.
pub(super) fn alive_of(key: &Bytes) -> Bytes {
    beside(key, ":alive")
}

/// Returns the name of the set of those who share a lock key.
pub(super) fn holders_of(key: &Bytes) -> Bytes {
    beside(key, ":holders")
}

/// Returns the name of the records of their shares.
pub(super) fn shares_of(key: &Bytes) -> Bytes {
    beside(key, ":shares")
}

/// Returns the name of the set of writers that wait for the readers of a lock key, on a node of a quorum.
pub(super) fn intent_of(key: &Bytes) -> Bytes {
    beside(key, ":intent")
}

/// Returns whether this is the name of a key that belongs to a lock key.
pub(super) fn is_beside(name: &[u8]) -> bool {
    let (name, has_mark) = name.strip_suffix(b"~").map_or((name, false), |name| (name, true));
    let suffixes = [":fence", ":grants", ":queue", ":alive", ":holders", ":shares", ":intent"];
    let Some((key, suffix)) = suffixes.iter().find_map(|suffix| Some((name.strip_suffix(suffix.as_bytes())?, *suffix)))
    else {
        return false;
    };
    let is_of = |key: &[u8]| !key.is_empty() && beside(&Bytes::copy_from_slice(key), suffix) == *whole(name, has_mark);
    // One for each line of the table above.
    let in_braces = key.strip_prefix(b"{").and_then(|key| key.strip_suffix(b"}"));
    let before_braces = key.strip_suffix(b"{}");
    let behind_stand_in = key.get(6..);
    [in_braces, before_braces, Some(key), behind_stand_in].into_iter().flatten().any(is_of)
}

fn whole(name: &[u8], has_mark: bool) -> Cow<'_, [u8]> {
    if has_mark { [name, b"~"].concat().into() } else { name.into() }
}

fn beside(key: &Bytes, suffix: &str) -> Bytes {
    let (key, suffix) = (&key[..], suffix.as_bytes());
    let parts: &[&[u8]] = match hash_tag(key) {
        Some(tag) if is_only_a_tag(key, tag) => &[key, b"{}", suffix],
        Some(_) => &[key, suffix],
        None if !key.contains(&b'}') => &[b"{", key, b"}", suffix],
        // In braces the key would have another tag: `a` for `a}b`.
        None => &[b"{", &stand_in(slot_of(key)), b"}", key, suffix, b"~"],
    };
    parts.concat().into()
}

/// Returns the channel on which releases of a lock key are published, if it has another name than the key.
///
/// fred takes only text for the name of a channel. So bytes of a key that are no text are escaped. A stand-in for the
/// hash tag precedes them where the key has no hash tag, or one that is no text: on a cluster the channel must be in
/// the slot of the key, whose node publishes. Where the key begins with text, as it does with the locker's prefix, so
/// does the channel, and permissions for `prefix*` suffice.
///
/// Two keys may share a channel. Then a release of one wakes the waiters for the other in vain.
pub(super) fn channel_of(key: &Bytes) -> Option<Bytes> {
    let text_ends = std::str::from_utf8(key).err()?.valid_up_to();
    if hash_tag(key).is_some_and(|tag| std::str::from_utf8(tag).is_ok()) {
        return Some(escaped(key).into());
    }
    // Before any other brace, so that this is the tag.
    let brace = key.iter().position(|&b| b == b'{').unwrap_or(key.len());
    let (text, rest) = key.split_at(text_ends.min(brace));
    Some([text, b"{", &stand_in(slot_of(key)), b"}", &escaped(rest)].concat().into())
}

/// Returns the bytes as text. Those that are no text become `%ff`.
fn escaped(bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes.len() + 8);
    for chunk in bytes.utf8_chunks() {
        text.extend_from_slice(chunk.valid().as_bytes());
        text.extend(chunk.invalid().iter().flat_map(|byte| format!("%{byte:02x}").into_bytes()));
    }
    text
}

/// Returns whether the key is its tag in braces, followed by nothing but empty braces.
fn is_only_a_tag(key: &[u8], tag: &[u8]) -> bool {
    let rest = key.strip_prefix(b"{").and_then(|rest| rest.strip_prefix(tag)).and_then(|rest| rest.strip_prefix(b"}"));
    rest.is_some_and(|rest| rest.chunks(2).all(|pair| pair == b"{}"))
}

/// Returns four letters that hash to this slot.
///
/// The slot is a CRC16, which is linear: bits that change in a text change the same bits of the slot, whatever the
/// text. So the letters are found bit by bit, from letters that hash to another slot.
fn stand_in(slot: u16) -> [u8; 4] {
    let mut letters = FIRST;
    let mut wrong = slot ^ slot_of(&letters);
    for &(bits, change) in CHANGES.iter() {
        if wrong & highest(bits) != 0 {
            wrong ^= bits;
            letters = xor(letters, change);
        }
    }
    letters
}

/// With the changes below, each of them becomes any letter from h to w.
const FIRST: [u8; 4] = *b"hhhh";

/// Changes of letters, and the bits of the slot that each changes; each is the only one with its highest bit.
static CHANGES: LazyLock<Vec<(u16, [u8; 4])>> = LazyLock::new(|| {
    let mut changes: Vec<(u16, [u8; 4])> = Vec::new();
    for place in 0..FIRST.len() {
        for flipped in [1, 2, 4, b'h' ^ b'p'] {
            let mut change = [0; 4];
            change.iter_mut().skip(place).take(1).for_each(|byte| *byte = flipped);
            let mut bits = slot_of(&change);
            for &(others, other) in &changes {
                if bits & highest(others) != 0 {
                    bits ^= others;
                    change = xor(change, other);
                }
            }
            if bits != 0 {
                changes.push((bits, change));
                // From the highest on, so that none undoes what one before it has set right.
                changes.sort_unstable_by_key(|&(bits, _)| std::cmp::Reverse(bits));
            }
        }
    }
    changes
});

fn highest(bits: u16) -> u16 {
    1_u16.checked_shl(u16::BITS - 1 - bits.leading_zeros()).unwrap_or_default()
}

fn xor(letters: [u8; 4], change: [u8; 4]) -> [u8; 4] {
    (u32::from_be_bytes(letters) ^ u32::from_be_bytes(change)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const KINDS: [fn(&Bytes) -> Bytes; 7] = [fence_of, grants_of, line_of, alive_of, holders_of, shares_of, intent_of];

    #[test]
    fn derived_names_are_as_documented() {
        for (key, fence) in [
            ("job", "{job}:fence"),
            ("{user:1}:job", "{user:1}:job:fence"),
            ("{job}", "{job}{}:fence"),
            ("{job}{}", "{job}{}{}:fence"),
            ("{{job}", "{{job}{}:fence"),
            ("{job", "{{job}:fence"),
            ("{job}{", "{job}{:fence"),
            ("{a}{b}", "{a}{b}:fence"),
            ("a}b", "{jnhl}a}b:fence~"),
        ] {
            assert_eq!(fence_of(&Bytes::from(key)), fence, "{key}");
        }
    }

    /// Of whatever is special in a name, and little else, so that names are close to each other.
    fn hostile_key(rng: &mut fastrand::Rng) -> Bytes {
        let parts = [
            "{", "}", "{}", ":", "~", "a", "b", "h", ":fence", ":queue", ":alive", ":grants", ":holders", ":shares",
            ":intent", "hhhh", "\u{ff}",
        ];
        let key: String = (0..rng.usize(1..6)).filter_map(|_| rng.choice(parts)).collect();
        key.into()
    }

    #[test]
    fn no_two_keys_share_a_derived_name() {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut owners: HashMap<Bytes, (Bytes, usize)> = HashMap::new();
        // All that can be made of six of these, or fewer; then others.
        let short = ["", "{", "}", "a", "~"];
        let mut keys = vec![String::new()];
        for _ in 0..6 {
            keys = keys.iter().flat_map(|key| short.map(|more| format!("{key}{more}"))).collect();
        }
        let every = keys.into_iter().filter(|key| !key.is_empty()).map(Bytes::from);
        for key in every.chain((0..50_000).map(|_| hostile_key(&mut rng))) {
            for (kind, name_of) in KINDS.iter().enumerate() {
                let owner = owners.entry(name_of(&key)).or_insert_with(|| (key.clone(), kind));
                assert_eq!(*owner, (key.clone(), kind), "both have {:?}, seed {seed}", name_of(&key));
            }
        }
    }

    /// What `scripts/pass_on_one.lua` takes for the name of the line, unless it is told another one.
    #[test]
    fn the_line_of_a_key_without_a_brace_has_the_usual_name() {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        for key in (0..20_000).map(|_| hostile_key(&mut rng)) {
            let usual = [b"{", &key[..], b"}:queue"].concat();
            assert!(!has_no_brace(&key) || line_of(&key) == usual, "{key:?}, seed {seed}");
        }
        assert!(has_no_brace(b"job:1") && !has_no_brace(b"{job}") && !has_no_brace(b"a}b"));
    }

    #[test]
    fn what_belongs_to_a_lock_key_is_told_from_lock_keys() {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..20_000 {
            let key = hostile_key(&mut rng);
            for name_of in KINDS.iter().filter(|_| !key.is_empty()) {
                assert!(is_beside(&name_of(&key)), "{:?} of {key:?}, seed {seed}", name_of(&key));
            }
        }
        for key in ["job", "job:fence", "a:grants~", ":queue", "{}:fence", "{job}:other", "{job}", "jnhla}b:fence~"] {
            assert!(!is_beside(key.as_bytes()), "{key}");
        }
    }

    #[test]
    fn a_channel_is_called_as_its_key_or_is_text_in_its_slot_that_begins_alike() {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..30_000 {
            let key: Bytes = (0..rng.usize(1..9)).map(|_| rng.choice(*b"{}{}ab:\xff\xc3\xbc").unwrap()).collect();
            let Some(channel) = channel_of(&key) else {
                assert!(std::str::from_utf8(&key).is_ok(), "{key:?}, seed {seed}");
                continue;
            };
            assert!(std::str::from_utf8(&key).is_err(), "{key:?}, seed {seed}");
            assert!(std::str::from_utf8(&channel).is_ok(), "{key:?}: {channel:?}, seed {seed}");
            assert_eq!(slot_of(&channel), slot_of(&key), "{key:?}: {channel:?}, seed {seed}");
            let prefixed: Bytes = [b"app:", &key[..]].concat().into();
            assert!(channel_of(&prefixed).unwrap().starts_with(b"app:"), "{key:?}, seed {seed}");
        }
        assert_eq!(channel_of(&Bytes::from_static(b"{user}:\xff")), Some(Bytes::from("{user}:%ff")));
    }

    #[test]
    fn every_slot_has_a_stand_in_of_four_letters() {
        for slot in 0..16_384 {
            let letters = stand_in(slot);
            assert_eq!(slot_of(&letters), slot);
            assert!(letters.iter().all(u8::is_ascii_lowercase), "{letters:?}");
        }
    }

    #[test]
    fn derived_keys_are_in_the_slot_of_their_lock_key_whatever_braces_it_has() {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..30_000 {
            let key = match rng.bool() {
                true => hostile_key(&mut rng),
                false => (0..rng.usize(1..9)).map(|_| rng.choice(*b"{}{}ab\xff").unwrap()).collect(),
            };
            for name_of in KINDS {
                assert_eq!(slot_of(&name_of(&key)), slot_of(&key), "{key:?}, seed {seed}");
            }
        }
    }
}
