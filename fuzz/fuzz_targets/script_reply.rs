//! Any reply to a script is a verdict or an error, and no text is a grant.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|wire: &[u8]| tenure::fuzzing::script_reply(wire));
