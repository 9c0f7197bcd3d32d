//! Writes the test certificates to a directory: `cargo run --example make_fixtures -- DIR`.
//!
//! Nothing of it is usable in production: the keys are made for tests and lie next to the certificates.

#[path = "../certs/fixtures.rs"]
mod fixtures;

use std::path::Path;
use std::process::ExitCode;
use std::{fs, io};

use fixtures::{World, write_gateway};

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "a tool for a terminal")]
fn main() -> ExitCode {
    let Some(dir) = std::env::args_os().nth(1) else {
        eprintln!("usage: make_fixtures DIR");
        return ExitCode::from(2);
    };
    match write(Path::new(&dir)) {
        Ok(variants) => {
            println!("4 good gateways and {variants} that must be refused are in {}", Path::new(&dir).display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cannot write to {}: {error}", Path::new(&dir).display());
            ExitCode::FAILURE
        }
    }
}

fn write(dir: &Path) -> io::Result<usize> {
    fs::create_dir_all(dir)?;
    let world = World::new();
    world.write_trust(&dir.join("trust"));
    for (name, leaf) in [("a", &world.good_a), ("b", &world.good_b), ("c", &world.good_c), ("i", &world.good_intermediate)] {
        write_gateway(&dir.join("good"), name, leaf);
    }
    let mut table = String::new();
    for variant in &world.variants {
        write_gateway(&dir.join("bad"), variant.name, &variant.leaf);
        table.push_str(&format!("{}\t{}\n", variant.name, variant.expected));
    }
    fs::write(dir.join("bad").join("expected.tsv"), table)?;
    Ok(world.variants.len())
}
