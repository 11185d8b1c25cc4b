//! The embedded store does what a server does: random operations of several grants, run on both.

use tenure_test_support::Server as Process;

use super::*;
use crate::Token;
use crate::hold::GrantId;
use crate::mode::Mode;
use crate::store::InLine;
use crate::store::memory::MemoryStore;

const PATIENCE: Duration = Duration::from_secs(20);
const KEYS: [&str; 3] = ["{s}a", "{s}b", "{s}c"];
/// Farther apart than a run takes, so that it shows by what the ttl of a key was set.
const TIMES: [Duration; 4] =
    [Duration::from_secs(2_000), Duration::from_secs(6_000), Duration::from_secs(10_000), Duration::from_secs(20_000)];
/// More than the two are apart, on a busy machine.
const TOLERANCE: Duration = Duration::from_secs(500);

/// What is done to both stores.
#[derive(Debug)]
enum What {
    Acquire(Duration),
    Renew(Duration, Extending),
    Release(Ending),
    Linger(Ending, Duration),
    Undo,
    ForceRelease,
    Downgrade,
    Remaining,
}

fn owned(rng: &mut fastrand::Rng, grants: &[GrantId], modes: &[Mode]) -> Owned {
    let mut keys = KEYS;
    rng.shuffle(&mut keys);
    let mode = *rng.choice(modes).unwrap();
    let count = if mode.is_shared() { 1 } else { *rng.choice(&[1, 1, 1, 2, 3]).unwrap() };
    let keys = keys[..count].iter().copied().map(Key::from).collect();
    let token = rng.choice(["job-1", "job-10"]).unwrap().parse().unwrap();
    let grant = if rng.u8(..4) == 0 { None } else { rng.choice(grants).copied() };
    Owned { keys, token, own_token: false, grant, mode }
}

fn what(rng: &mut fastrand::Rng, grants: &[GrantId]) -> What {
    let (time, ending) =
        (rng.choice(TIMES).unwrap(), rng.choice([Ending::Grant, Ending::Grant, Ending::Lock]).unwrap());
    let earlier = rng.choice(grants).copied();
    match rng.u8(..24) {
        0..8 => What::Acquire(time),
        8..10 => What::Renew(time, Extending::AtLeast),
        10..12 => What::Renew(time, Extending::Exactly),
        12 => What::Renew(time, Extending::Claim { earlier }),
        13 => What::Renew(time, Extending::GiveBack { earlier }),
        14..16 => What::Release(ending),
        16..18 => What::Linger(ending, time),
        18 => What::ForceRelease,
        19..21 => What::Downgrade,
        21..23 => What::Remaining,
        _ => What::Undo,
    }
}

/// Returns what the store has decided, without fencing tokens, which come from each one's own clock.
async fn run(store: &dyn Store, owned: &Owned, what: &What) -> String {
    match *what {
        What::Acquire(ttl) => {
            let wanted = Wanted::at_once(owned.clone(), ttl);
            match store.acquire(&wanted, InLine::No, PATIENCE).await.unwrap() {
                Acquired::Granted { fencing_token } => format!("granted: {}", fencing_token.is_some()),
                Acquired::Held { place, .. } => format!("held: {place}"),
            }
        }
        What::Renew(ttl, how) => format!("{:?}", store.renew(owned, ttl, how, PATIENCE).await.unwrap()),
        What::Release(ending) => format!("{:?}", store.release(owned, ending, PATIENCE).await.unwrap()),
        What::Linger(ending, rest) => format!("{:?}", store.linger(owned, ending, rest, PATIENCE).await.unwrap()),
        What::ForceRelease => {
            let mut ended = Vec::new();
            for key in &*owned.keys {
                ended.push(store.force_release(key, &Whose::All, PATIENCE).await.unwrap());
            }
            format!("{ended:?}")
        }
        What::Downgrade if owned.keys.len() == 1 && !owned.mode.is_shared() => {
            format!("{:?}", store.downgrade(owned, PATIENCE).await.unwrap())
        }
        What::Downgrade => String::new(),
        What::Remaining => {
            let left = store.remaining(owned, PATIENCE).await.unwrap();
            // The times are multiples of this.
            left.map_or_else(String::new, |left| ((left + TOLERANCE).as_secs() / 2_000).to_string())
        }
        // What it returns comes from each one's own clock.
        What::Undo => store.undo(owned, &Latest::default(), PATIENCE).await.map(|_| String::new()).unwrap(),
    }
}

/// Asserts that both hold the same for each key, for the same time. Returns whether a key is nobody's, and whether a
/// record has a time until which its key must stay taken, and whether a key is shared.
async fn compare(process: &Process, server: &RedisStore, memory: &MemoryStore) -> [bool; 3] {
    let look = "local all = {} \
        for i, key in ipairs(KEYS) do \
            local held, record = redis.call('GET', key), redis.call('GET', key .. ':grants') or '' \
            local names = {['\\n\\nh'] = 'nobody', ['\\n\\nr'] = 'readers', ['\\n\\np'] = 'permits'} \
            held = names[held] or held or '-' \
            all[i] = held .. ' ' .. redis.call('PTTL', key) .. ' ' .. (string.find(record, ',h=') and 1 or 0) \
            for _, beside in ipairs({'', ':grants', ':fence', ':holders', ':shares'}) do \
                assert(redis.call('PTTL', key .. beside) ~= -1, key .. beside) \
            end \
        end return table.concat(all, ',')";
    let seen = process.cli(&[&["EVAL", look, "3"][..], &KEYS].concat());
    let name = |token: &Token| if *token == Token::nobody() { "nobody".into() } else { token.as_str().to_owned() };
    let (mut is_nobodys, mut is_kept, mut is_shared) = (false, false, false);
    for (key, seen) in KEYS.map(Key::from).into_iter().zip(seen.split(',')) {
        let [held, ttl, kept] = <[&str; 3]>::try_from(seen.split(' ').collect::<Vec<_>>()).unwrap();
        let shared = memory.shared(&key).map(|(mode, until)| {
            let name = if mode == Mode::Read { "readers" } else { "permits" };
            (name.to_owned(), until)
        });
        is_shared |= shared.is_some();
        let expected = memory.holder(&key).map(|(token, until)| (name(&token), until)).or(shared);
        assert_eq!(held, expected.as_ref().map_or("-", |(held, _)| held), "{key}");
        if let Some((_, until)) = expected {
            let left = until - Instant::now();
            let apart = left.abs_diff(Duration::from_millis(ttl.parse().unwrap()));
            assert!(apart < TOLERANCE, "{key}: {ttl} ms, and {left:?}");
        }
        (is_nobodys, is_kept) = (is_nobodys || held == "nobody", is_kept || kept == "1");
        let all = async |store: &dyn Store| {
            let mut all = store.holders(&key, PATIENCE).await.unwrap();
            let first = store.inspect(&key, PATIENCE).await.unwrap();
            assert_eq!(all.is_empty(), first.is_none());
            let left = |holder: &Holder| holder.remaining.unwrap_or(Duration::MAX);
            if let (Some(a), Some(b)) = (all.first(), &first) {
                assert!(left(a).abs_diff(left(b)) < TOLERANCE, "{key}: {a:?}, {b:?}");
            }
            all.sort_by_key(|holder| holder.token.as_str().to_owned());
            all.into_iter().map(|holder| (left(&holder), holder.token)).unzip::<_, _, Vec<_>, Vec<_>>()
        };
        let (seen, expected) = (all(server).await, all(memory).await);
        assert_eq!(seen.1, expected.1, "{key}");
        assert!(
            seen.0.iter().zip(&expected.0).all(|(a, b)| a.abs_diff(*b) < TOLERANCE),
            "{key}: {seen:?}, {expected:?}"
        );
    }
    [is_nobodys, is_kept, is_shared]
}

async fn histories(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let process = Process::start();
    let server = RedisStore::connect(Driver::default(), &process.url(), String::new(), PATIENCE, 0).await.unwrap();
    let (mut nobodys, mut kept, mut shared) = (0, 0, 0);
    let found_enough = |nobodys, kept, shared| nobodys > 50 && kept > 0 && shared > 200;
    for n in 0..1_000 {
        // A record that keeps a key is rare: some hundred histories have none.
        if n >= 100 && found_enough(nobodys, kept, shared) {
            break;
        }
        process.cli(&["FLUSHALL"]);
        // In half of the histories nobody shares a key.
        let all = [Mode::Exclusive, Mode::Exclusive, Mode::Read, Mode::Permit];
        let modes = if n % 2 == 0 { &all[..1] } else { &all };
        let (memory, grants) = (MemoryStore::new(), [(); 3].map(|()| GrantId::random()));
        for _ in 0..20 {
            let (owned, what) = (owned(&mut rng, &grants, modes), what(&mut rng, &grants));
            let decided = run(&server, &owned, &what).await;
            let expected = run(&memory, &owned, &what).await;
            assert_eq!(decided, expected, "{what:?} by {:?} of {:?}", owned.grant, owned.keys);
            let seen = compare(&process, &server, &memory).await.map(u32::from);
            (nobodys, kept, shared) = (nobodys + seen[0], kept + seen[1], shared + seen[2]);
        }
    }
    // Or there was nothing to compare.
    assert!(found_enough(nobodys, kept, shared), "{nobodys}, {kept}, {shared}");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn the_embedded_store_decides_and_leaves_what_a_server_does() {
    let seed = fastrand::u64(..);
    let played = tokio::spawn(histories(seed)).await;
    assert!(played.is_ok(), "seed {seed}");
}
