//! The slots of a cluster, by which its keys are spread over its nodes.

/// Returns the slot of a key: the CRC16 of its hash tag, or of all of it.
pub(super) fn slot_of(key: &[u8]) -> u16 {
    crc16(hash_tag(key).unwrap_or(key)) & (SLOTS - 1)
}

const SLOTS: u16 = 16_384;

/// Returns the part of the key that alone decides its slot: the bytes between its first `{` and the first `}` after
/// that, if there are any. <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags>
pub(super) fn hash_tag(key: &[u8]) -> Option<&[u8]> {
    let (_, after) = split_at_first(key, b'{')?;
    let (tag, _) = split_at_first(after, b'}')?;
    (!tag.is_empty()).then_some(tag)
}

fn split_at_first(text: &[u8], byte: u8) -> Option<(&[u8], &[u8])> {
    let mut parts = text.splitn(2, |&b| b == byte);
    Some((parts.next()?, parts.next()?))
}

/// CRC16 as XMODEM has it: the polynomial 0x1021, from zero on.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc: u16, byte| {
        let [high, low] = crc.to_be_bytes();
        u16::from_be_bytes([low, 0]) ^ TABLE.get(usize::from(high ^ byte)).copied().unwrap_or_default()
    })
}

/// What each byte contributes.
const TABLE: [u16; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        #[expect(clippy::cast_possible_truncation, reason = "it is below 256")]
        let mut crc = (byte as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
            bit += 1;
        }
        #[expect(clippy::indexing_slicing, reason = "it is below 256, and known when this is compiled")]
        {
            table[byte] = crc;
        }
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_cluster() {
        // From the cluster specification, and from CLUSTER KEYSLOT.
        for (key, slot) in [
            (&b"123456789"[..], 0x31C3),
            (b"foo", 12_182),
            (b"{foo}:bar", 12_182),
            (b"x{foo}{bar}", 12_182),
            (b"", 0),
            (b"{}foo", slot_of(b"{}foo")),
        ] {
            assert_eq!(slot_of(key), slot, "{key:?}");
        }
        assert_ne!(slot_of(b"{}foo"), slot_of(b""), "an empty tag is none");
    }

    #[cfg(feature = "fred")]
    #[test]
    fn a_client_finds_the_same_slots() {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..30_000 {
            let key: Vec<u8> = (0..rng.usize(0..9)).map(|_| rng.choice(*b"{}{}ab\xff").unwrap()).collect();
            assert_eq!(slot_of(&key), fred::util::redis_keyslot(&key), "{key:?}, seed {seed}");
        }
    }
}
