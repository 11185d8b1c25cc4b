//! The servers of this run have the version that the run is for.

use tenure_test_support::{Server, Version};

#[test]
fn the_servers_are_of_the_version_that_this_run_is_for() {
    let server = Server::start();
    let info = server.cli(&["INFO", "server"]);
    let told = |field: &str| info.lines().find_map(|line| line.trim_end().strip_prefix(field)?.strip_prefix(':'));
    let (product, number) = match told("valkey_version") {
        Some(number) => ("valkey", number),
        None => ("redis", told("redis_version").unwrap()),
    };
    let number: Vec<&str> = number.split('.').take(2).collect();
    let is = format!("{product} {}", number.join("."));
    eprintln!("on {is}");
    assert_eq!(is, Version::of_this_run().to_string());
    if let Some(expected) = Version::expected() {
        assert_eq!(is, expected);
    }
}
