//! Any refusal of a server, and any failure of a connection, is an error that can be shown and shows no secret.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| tenure::fuzzing::server_error(text));
