//! The page of guarantees, and the mutants, name tests that exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use tenure::Locker;
use tenure_test_support::soon;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the sources of a test program and of its modules.
fn sources_of(program: &str) -> Vec<PathBuf> {
    let mut sources = Vec::new();
    let mut folders = match program {
        "lib" => vec![root().join("src")],
        _ => {
            sources.push(root().join(format!("tests/{program}.rs")));
            vec![root().join("tests").join(program)]
        }
    };
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => sources.push(path),
            }
        }
    }
    sources
}

/// Returns whether a file is the module with this path, or has it inline.
fn is_module(file: &Path, program: &str, path: &[&str]) -> bool {
    let file = file.strip_prefix(root()).unwrap().with_extension("");
    let parts: Vec<_> = file.iter().map(|part| part.to_str().unwrap()).collect();
    let own = match (&parts[..], program) {
        (["src", own @ ..], "lib") => own,
        (["tests", of, "main"], _) | (["tests", of], _) if *of == program => &[],
        (["tests", of, own @ ..], _) if *of == program => own,
        _ => return false,
    };
    path == own || path == [own, &["tests"]].concat() || own == ["lib"] && path.is_empty()
}

/// Returns whether `cargo test` finds this test: a program, and the path of a test in it.
fn exists(program: &str, test: &str) -> bool {
    let path: Vec<_> = test.split("::").collect();
    let (name, modules) = path.split_last().unwrap();
    sources_of(program).iter().filter(|file| is_module(file, program, modules)).any(|file| {
        let text = fs::read_to_string(file).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let declares = |line: &str| line.trim_start().trim_start_matches("async ").starts_with(&format!("fn {name}("));
        let is_test = |at: usize| {
            // Its attributes are right above it, and may be followed by comments in a macro.
            let above = lines[..at].iter().rev().take_while(|line| !line.trim().is_empty());
            above.into_iter().any(|line| line.trim().starts_with("#[test]") || line.trim().starts_with("#[tokio::test"))
        };
        lines.iter().enumerate().any(|(at, line)| declares(line) && is_test(at))
    })
}

#[test]
fn each_guarantee_names_tests_that_exist() {
    let page = fs::read_to_string(root().join("src/docs/guarantees.rs")).unwrap();
    let rows: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("//! | ")).collect();
    let (heads, rows): (Vec<_>, Vec<_>) =
        rows.into_iter().partition(|row| row.starts_with("---") || row.contains("| shown by |"));
    let sections = page.lines().filter(|line| line.starts_with("//! # ")).count();
    // A table of what is guaranteed and one of what is not, for each section.
    assert_eq!(heads.len(), sections * 2 * 2, "{heads:?}");
    assert!(rows.len() > 50, "there are {} rows", rows.len());
    let mut named = BTreeSet::new();
    for row in rows {
        let cells: Vec<_> = row.trim_end_matches(" |").split('|').map(str::trim).collect();
        let [what, _, shown_by] = cells[..] else { panic!("{row}: not three cells") };
        let tests: Vec<_> = shown_by.split(", ").collect();
        for test in tests {
            let name = test.strip_prefix('`').and_then(|test| test.strip_suffix('`'));
            let (program, path) =
                name.and_then(|name| name.split_once(' ')).unwrap_or_else(|| panic!("{what}: {test}"));
            assert!(exists(program, path), "{what}: there is no test {test}");
            named.insert((program, path));
        }
    }
    assert!(named.len() > 50, "it names {} tests", named.len());
    assert!(!exists("it", "loss::there_is_no_such_test") && !exists("it", "drops::there"));
    assert!(!exists("it", "drops::a_deleted_key_is_missing_at_the_next_renewal"), "it is in another module");
}

#[test]
fn each_mutant_names_tests_that_exist() {
    let mut mutants = 0;
    for entry in fs::read_dir(root().join("tests/mutants")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let first = text.lines().next().unwrap();
        let words: Vec<_> = first.strip_prefix("# caught by: ").unwrap().split(' ').collect();
        let (program, test) = match words[..] {
            ["--lib", test, ..] => ("lib", test),
            ["--test", program, test, ..] => (program, test),
            _ => panic!("{}: {first}", path.display()),
        };
        assert!(exists(program, test), "{}: there is no test {test} in {program}", path.display());
        mutants += 1;
    }
    assert!(mutants >= 25, "{mutants}");
}

#[tokio::test]
async fn two_embedded_lockers_know_nothing_of_each_other() {
    let (one, other) = (Locker::in_memory(), Locker::in_memory());
    let _held = soon(one.try_lock("k")).await.unwrap();
    let also = soon(other.try_lock("k")).await.unwrap();
    assert!(soon(one.clone().try_lock("k")).await.is_err() && also.is_held());
}
