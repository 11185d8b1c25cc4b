//! Any text is a lease or an error, and a lease survives its own text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tenure::Lease;

fuzz_target!(|text: &str| {
    if let Ok(lease) = text.parse::<Lease>() {
        let text = lease.to_string();
        assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b":-._~%".contains(&b)), "{text}");
        assert_eq!(text.parse::<Lease>().unwrap(), lease);
        drop(format!("{lease:?}"));
    }
});
