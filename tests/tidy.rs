//! Architecture and style as a test. Each rule is a function from files to violations; each has tests
//! that plant a violation and see it caught. The tables to edit are in `tests/tidy/rings.rs` (who may
//! use whom), `tests/tidy/ratchet.rs` (what is not good yet) and `tests/tidy/supply.rs` (crates).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may stop at the first surprise")]

#[path = "tidy/places.rs"]
mod places;
#[path = "tidy/ratchet.rs"]
mod ratchet;
#[path = "tidy/rings.rs"]
mod rings;
#[path = "tidy/size.rs"]
mod size;
#[path = "tidy/source.rs"]
mod source;
#[path = "tidy/supply.rs"]
mod supply;
#[path = "tidy/words.rs"]
mod words;

use std::path::{Path, PathBuf};

use source::File;

/// What may stand at the top of the repository.
const TOP_LEVEL: &[&str] = &[
    ".ci",
    ".gitignore",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "README.md",
    "SECURITY.md",
    "benches",
    "certs",
    "clippy.toml",
    "config",
    "deny.toml",
    "docs",
    "examples",
    "fuzz",
    "rustfmt.toml",
    "src",
    "tests",
];

/// Not part of the repository.
const NOT_OURS: &[&str] = &[".git", "target"];

/// The tree that is checked: where cargo runs the test, which need not be where it was built.
fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| !NOT_OURS.contains(&name.as_str()));
    names.sort();
    names
}

/// Every text file of the repository. What is not UTF-8 is data.
fn tree() -> Vec<File> {
    let mut files: Vec<File> = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for name in names(&root().join(&folder)) {
            let path = format!("{folder}{name}");
            if root().join(&path).is_dir() {
                folders.push(format!("{path}/"));
            } else if let Ok(text) = std::fs::read_to_string(root().join(&path)) {
                files.push(File::new(&path, &text));
            }
        }
    }
    let test_modules: Vec<_> = files.iter().flat_map(File::test_modules).collect();
    for file in files.iter_mut().filter(|file| test_modules.iter().any(|module| file.belongs_to(module))) {
        file.production = file.production.chars().map(|c| if c == '\n' { c } else { ' ' }).collect();
    }
    assert!(files.iter().any(|file| file.path == "src/lib.rs"), "the tree is read from the repository's root");
    files
}

fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

#[track_caller]
fn none(found: &[String]) {
    assert!(found.is_empty(), "{} violations:\n{}", found.len(), found.join("\n"));
}

#[track_caller]
fn every_file(rule: fn(&File) -> Vec<String>) {
    none(&tree().iter().flat_map(rule).collect::<Vec<_>>());
}

#[test]
fn modules_use_only_what_the_ring_table_allows() {
    every_file(rings::uses);
}

#[test]
fn every_module_of_the_ring_table_exists() {
    let files = tree();
    let here =
        |name: &str| files.iter().any(|file| file.module() == Some(name)) || ratchet::NOT_YET.contains(&format!("src/{name}").as_str());
    let missing = rings::MODULES.iter().filter(|(name, ..)| !here(name));
    none(&missing.map(|(name, ..)| format!("ring table: `{name}` does not exist")).collect::<Vec<_>>());
    none(&words::arrived(&files, ratchet::NOT_YET));
    let document = text("ARCHITECTURE.md");
    let unsaid = rings::MODULES.iter().filter(|(name, ring, _)| !document.contains(&format!("\n| {ring} | `{name}` |")));
    none(&unsaid.map(|(name, ring, _)| format!("ARCHITECTURE.md: no row for `{name}` in ring {ring}")).collect::<Vec<_>>());
}

#[test]
fn the_pure_core_names_nothing_outside() {
    every_file(rings::purity);
}

#[test]
fn the_list_of_failpoints_has_every_place_and_nothing_else() {
    none(&places::listed(&tree()));
}

#[test]
fn unsafe_stays_in_its_places() {
    every_file(rings::confined);
}

#[test]
fn tasks_are_started_in_few_places() {
    every_file(rings::spawn);
}

#[test]
fn every_queue_is_bounded() {
    every_file(rings::queues);
}

#[test]
fn files_are_short() {
    none(&size::files(&tree(), ratchet::LONG_FILES));
}

#[test]
fn functions_are_short() {
    none(&size::long_functions(&tree(), ratchet::LONG_FUNCTIONS, ratchet::EXHAUSTIVE_MATCHES));
}

#[test]
fn the_command_does_nothing_but_call_the_library() {
    assert!(text("src/main.rs").lines().count() <= 40);
}

#[test]
fn invariants_are_defined_before_they_are_cited() {
    none(&words::invariants(&tree()));
}

#[test]
fn module_folders_say_what_they_own() {
    every_file(words::module_docs);
}

#[test]
fn every_must_of_a_protocol_is_cited() {
    none(&words::anchors(&tree(), ratchet::NOT_YET));
}

#[test]
fn architecture_names_what_exists() {
    none(&words::architecture(&tree(), ratchet::NOT_YET));
}

#[test]
fn links_lead_somewhere() {
    none(&words::links(&tree(), ratchet::NOT_YET));
}

#[test]
fn architecture_explains_every_state_of_the_handoff() {
    none(&words::states(&tree()));
}

#[test]
fn promises_name_tests_that_exist() {
    none(&words::promises(&tree()));
}

#[test]
fn nothing_is_left_over() {
    every_file(words::leftovers);
}

#[test]
fn file_names_say_what_is_inside() {
    every_file(words::file_names);
}

#[test]
fn every_bound_has_its_reason() {
    every_file(words::limits);
}

#[test]
fn the_top_level_is_short() {
    let strange = names(&root()).into_iter().filter(|name| !TOP_LEVEL.contains(&name.as_str()));
    none(&strange.map(|name| format!("`{name}` does not belong at the top of the repository")).collect::<Vec<_>>());
}

#[test]
fn rust_vmm_crates_move_together() {
    none(&supply::lock_step(&text("Cargo.toml"), &text("Cargo.lock")));
}

#[test]
fn no_crate_is_below_its_security_floor() {
    none(&supply::floors(&text("Cargo.lock")));
}

#[test]
fn no_refused_crate_is_locked() {
    none(&supply::refused(&text("Cargo.lock")));
}

#[test]
fn what_is_for_tests_alone_is_not_in_the_program() {
    none(&supply::tests_only(&text("Cargo.toml"), &text("Cargo.lock")));
}

#[test]
fn ci_runs_the_test_command_of_the_readme() {
    let (readme, ci) = (text("README.md"), text(".ci/run"));
    let after: Vec<_> = readme.split("<!-- test-command -->").skip(1).collect();
    let [after] = after.as_slice() else { panic!("README.md marks one test command, found {}", after.len()) };
    let block =
        after.trim_start().strip_prefix("```sh\n").and_then(|block| block.split("```").next()).expect("a fenced block follows the mark");
    assert_eq!(block.trim(), "cargo test --locked");
    // What a feature adds is tested beside it.
    let others = |line: &&str| line.contains("cargo test") && !line.contains("--features pkcs11");
    assert_eq!(ci.lines().find(others), None, ".ci/run takes the command from README.md");
    assert!(ci.contains("<!-- test-command -->"));
}
