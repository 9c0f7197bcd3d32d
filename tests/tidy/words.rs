//! Documents and comments say what is true: names that exist, invariants that are defined, nothing left over.

use crate::source::File;

/// Text after each `marker` up to the first character that `part` refuses, with its line.
fn marked<'a>(text: &'a str, marker: &'a str, part: fn(char) -> bool) -> impl Iterator<Item = (usize, &'a str)> {
    text.match_indices(marker).map(move |(at, _)| {
        let rest = &text[at + marker.len()..];
        let end = rest.find(|c| !part(c)).unwrap_or(rest.len());
        (text[..at].matches('\n').count() + 1, &rest[..end])
    })
}

fn name_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

/// What counts as a definition: the mark `INVARIANT(…)` or a name in backticks behind `*Invariants:*` in a
/// module doc (`//!`, in any file), and a list item of the section `## Invariants` of ARCHITECTURE.md.
fn defined_invariants(files: &[File]) -> Vec<String> {
    let mut names = Vec::new();
    for file in files {
        if file.path == "ARCHITECTURE.md" {
            let section = file.text.split("\n## ").find(|section| section.starts_with("Invariants")).unwrap_or("");
            names.extend(marked(section, "\n- `", name_part).map(|(_, name)| name.to_owned()));
        } else if file.path.ends_with(".rs") {
            let doc = file.module_doc();
            let after = doc.split("*Invariants").nth(1).unwrap_or("");
            let end = ["*Read first", "*Owns", "*Never"].iter().filter_map(|word| after.find(word)).min();
            names.extend(after[..end.unwrap_or(after.len())].split('`').skip(1).step_by(2).map(str::to_owned));
            names.extend(marked(&doc, "INVARIANT(", name_part).map(|(_, name)| name.to_owned()));
        }
    }
    names
}

/// A mark `INVARIANT(…)` in a comment whose name no document defines.
pub fn invariants(files: &[File]) -> Vec<String> {
    let defined = defined_invariants(files);
    let mut found = Vec::new();
    for file in files {
        for (line, name) in marked(&file.comments, "INVARIANT(", name_part) {
            if !name.is_empty() && !defined.iter().any(|known| known == name) {
                found.push(format!("{}:{line}: invariant `{name}` is defined in no module doc and not in ARCHITECTURE.md", file.path));
            }
        }
    }
    found
}

/// Every module folder says what it owns and what it never does.
pub fn module_docs(file: &File) -> Vec<String> {
    let inside = file.path.strip_prefix("src/").and_then(|path| path.strip_suffix("/mod.rs"));
    if inside.is_none_or(|inside| inside.contains('/')) {
        return Vec::new();
    }
    let doc = file.module_doc();
    let missing = ["Owns", "Never"].into_iter().filter(|word| !doc.contains(&format!("*{word}")));
    missing.map(|word| format!("{}: the module doc has no *{word}:*", file.path)).collect()
}

/// Specifications with anchored rules: name in a citation, path.
const SPECIFICATIONS: &[(&str, &str)] = &[("PROTOCOL.md", "src/wire/PROTOCOL.md"), ("vmm-protocol.md", "docs/vmm-protocol.md")];

/// Anchors `must-…` that nothing cites, and citations `SPEC: PROTOCOL.md#must-…` of no anchor.
pub fn anchors(files: &[File], not_yet: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (name, path) in SPECIFICATIONS.iter().filter(|(_, path)| !not_yet.contains(path)) {
        let text = files.iter().find(|file| file.path == *path).map_or("", |file| file.text.as_str());
        let anchors: Vec<_> = ["\"must-", "`must-", "#must-", "{#must-", "[must-"]
            .iter()
            .flat_map(|marker| marked(text, marker, name_part))
            .filter(|(_, rest)| !rest.is_empty())
            .map(|(line, rest)| (line, format!("must-{rest}")))
            .collect();
        let citation = format!("SPEC: {name}#");
        let cited: Vec<_> = files
            .iter()
            .filter(|file| file.path.starts_with("src/") || file.path.starts_with("tests/"))
            .flat_map(|file| marked(&file.comments, &citation, name_part).map(move |(line, rest)| (&file.path, line, rest)))
            .collect();
        for (line, anchor) in &anchors {
            let first = anchors.iter().find(|(_, same)| same == anchor).is_some_and(|(at, _)| at == line);
            let message = format!("{path}:{line}: `{anchor}` is cited by no `{citation}{anchor}`");
            if first && !cited.iter().any(|(.., rest)| rest == anchor) && !found.contains(&message) {
                found.push(message);
            }
        }
        for (file, line, rest) in cited {
            if rest.len() > "must-".len() && rest.starts_with("must-") && !anchors.iter().any(|(_, anchor)| anchor == rest) {
                found.push(format!("{file}:{line}: `{rest}` is no anchor of {path}"));
            }
        }
    }
    found
}

/// Modules and files that ARCHITECTURE.md names and that do not exist.
pub fn architecture(files: &[File], not_yet: &[&str]) -> Vec<String> {
    let Some(document) = files.iter().find(|file| file.path == "ARCHITECTURE.md") else {
        return vec!["ARCHITECTURE.md: missing".to_owned()];
    };
    let exists = |name: &str| {
        let folder = format!("{}/", name.trim_end_matches('/'));
        files.iter().any(|file| file.path == name || file.path.starts_with(&folder))
    };
    let mut found = Vec::new();
    for (index, line) in document.text.lines().enumerate() {
        for word in line.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/'))) {
            let path = if word.starts_with("src/") || word.starts_with("tests/") || word.starts_with("docs/") {
                word.trim_end_matches(['/', '.']).to_owned()
            } else if word.ends_with('/') && word.len() > 1 {
                format!("src/{}", word.trim_end_matches('/'))
            } else {
                continue;
            };
            let top = path.trim_start_matches("src/");
            if !exists(&path) && !exists(top) && !not_yet.contains(&path.as_str()) {
                found.push(format!("ARCHITECTURE.md:{}: `{path}` does not exist", index + 1));
            }
        }
    }
    found
}

/// Links between documents that lead nowhere.
pub fn links(files: &[File], not_yet: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with(".md")) {
        let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        for (line, link) in marked(&file.text, "](", |c| c != ')') {
            let target = link.split('#').next().unwrap_or(link);
            if target.is_empty() || link.contains("://") {
                continue;
            }
            let mut parts: Vec<_> = folder.split('/').filter(|part| !part.is_empty()).collect();
            for part in target.split('/').filter(|part| !part.is_empty() && *part != ".") {
                if part == ".." {
                    parts.pop();
                } else {
                    parts.push(part);
                }
            }
            let path = parts.join("/");
            let exists = files.iter().any(|file| file.path == path || file.path.starts_with(&format!("{path}/")));
            if !exists && !not_yet.contains(&path.as_str()) {
                found.push(format!("{}:{line}: the link to `{path}` leads nowhere", file.path));
            }
        }
    }
    found
}

/// States of `transitions.txt` that ARCHITECTURE.md does not explain.
pub fn states(files: &[File]) -> Vec<String> {
    let text = |path: &str| files.iter().find(|file| file.path == path).map_or("", |file| file.text.as_str());
    let document = text("ARCHITECTURE.md");
    let mut states: Vec<_> = text("src/migration/transitions.txt")
        .lines()
        .filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    states.sort_unstable();
    states.dedup();
    states.retain(|state| !document.contains(&format!("\n| `{state}` |")));
    states.iter().map(|state| format!("ARCHITECTURE.md: no table has the state `{state}` of src/migration/transitions.txt")).collect()
}

/// Entries of the list of things to come that have come.
pub fn arrived(files: &[File], not_yet: &[&str]) -> Vec<String> {
    let here = |entry: &&&str| files.iter().any(|file| file.path == **entry || file.path.starts_with(&format!("{entry}/")));
    not_yet.iter().filter(here).map(|entry| format!("NOT_YET: `{entry}` exists: take it out")).collect()
}

/// Tests that a document names as the proof of a promise, `(test: name, name)`, and that do not exist.
pub fn promises(files: &[File]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with(".md")) {
        for (line, names) in marked(&file.text, "(test: ", |c| c != ')') {
            for name in names.split([',', '`', ' ', '\n']).filter(|name| !name.is_empty()) {
                let function = format!("fn {name}(");
                if !files.iter().any(|file| file.code.contains(&function)) {
                    found.push(format!("{}:{line}: there is no test `{name}`", file.path));
                }
            }
        }
    }
    found
}

/// Words that mark unfinished work, and traces of somebody's machine. Split, so that this file has none.
const LEFTOVERS: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("X", "XX"),
    concat!("to", "do!"),
    concat!("unimple", "mented!"),
    concat!("d", "bg!"),
    concat!("#[ig", "nore]"),
    concat!("/wo", "rk/"),
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("bash", "_jobs"),
    concat!("index.crat", "es.io"),
    concat!("static.crat", "es.io"),
    concat!("crat", "es.io-index"),
    concat!("registry.npm", "js.org"),
    concat!("py", "pi.org"),
    concat!("pythonho", "sted.org"),
    concat!("deb.deb", "ian.org"),
];

/// Leftovers in any text file. `Cargo.lock` is written by cargo and names its registry.
pub fn leftovers(file: &File) -> Vec<String> {
    let mut found = Vec::new();
    if file.path == "Cargo.lock" || file.path.ends_with("/Cargo.lock") {
        return found;
    }
    for word in LEFTOVERS {
        for (at, _) in file.text.match_indices(word) {
            let joined = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
            let before = file.text[..at].chars().next_back();
            let after = file.text[at + word.len()..].chars().next();
            let inside = joined(before) || (word.ends_with(|c: char| c.is_ascii_alphanumeric()) && joined(after));
            let relative = word.starts_with('/') && before == Some('.');
            if !inside && !relative {
                found.push(format!("{}:{}: leftover `{word}`", file.path, file.text[..at].matches('\n').count() + 1));
            }
        }
    }
    found
}

/// Names that say nothing about what is inside.
pub fn file_names(file: &File) -> Vec<String> {
    let parts = file.path.split('/').map(|part| part.split('.').next().unwrap_or(part));
    let empty = parts.filter(|part| matches!(*part, "util" | "utils" | "common" | "helper" | "helpers" | "misc"));
    empty.map(|part| format!("{}: `{part}` says nothing: name what it holds", file.path)).collect()
}

/// Every bound says why it has its value: all constants of `limits.rs`, and `…_MAX` in `wire/`. The highest
/// version that we speak is no bound.
pub fn limits(file: &File) -> Vec<String> {
    let (all, wire) = (file.path == "src/limits.rs", file.path.starts_with("src/wire/"));
    let mut found = Vec::new();
    let mut doc = String::new();
    for ((index, line), code) in file.text.lines().enumerate().zip(file.production.lines()) {
        let line = line.trim();
        let name = code.trim().strip_prefix("pub const ").filter(|rest| !rest.starts_with("fn ")).and_then(|rest| rest.split(':').next());
        if let Some(name) = name
            && (all || (wire && name.ends_with("_MAX") && !name.starts_with("VERSION_")))
            && !doc.contains("LIMIT:")
        {
            found.push(format!("{}:{}: `{name}` has no `LIMIT:` comment", file.path, index + 1));
        }
        match line {
            _ if line.starts_with("//") => doc.push_str(line),
            _ if line.starts_with("#[") => {}
            _ => doc.clear(),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> Vec<File> {
        files.iter().map(|(path, text)| File::new(path, text)).collect()
    }

    fn check(rule: fn(&File) -> Vec<String>, path: &str, text: &str, violations: usize) {
        let found = rule(&File::new(path, text));
        assert_eq!(found.len(), violations, "{path}: {text}: {found:?}");
    }

    #[test]
    fn an_invariant_that_nobody_defines_is_refused() {
        let user = ("src/memory/ram.rs", "// INVARIANT(one-copy): read once\nfn f() {}");
        let module = ("src/memory/mod.rs", "//! RAM.\n//!\n//! *Invariants:* `one-copy` (read\n//! once). *Read first:* `ram.rs`.\n");
        let document = ("ARCHITECTURE.md", "# A\n\n## Invariants\n\n- `one-copy`: read once\n\n## Next\n");
        assert_eq!(invariants(&tree(&[user])).len(), 1);
        assert!(invariants(&tree(&[user, module])).is_empty());
        assert!(invariants(&tree(&[user, document])).is_empty());
        assert!(invariants(&tree(&[user, ("src/a.rs", "//! A.\n//! INVARIANT(one-copy): read once.")])).is_empty());
        assert_eq!(invariants(&tree(&[module, ("src/a.rs", "// INVARIANT(ram.rs)")])).len(), 1);
    }

    #[test]
    fn a_module_folder_without_owns_and_never_is_refused() {
        check(module_docs, "src/wire/mod.rs", "//! Frames.\n", 2);
        check(module_docs, "src/wire/mod.rs", "//! Frames.\n//! *Owns:* bytes.\nuse x;\n//! *Never:* late.", 1);
        check(module_docs, "src/wire/mod.rs", "//! *Owns:* bytes. *Never:* files.", 0);
        check(module_docs, "src/wire/frame.rs", "", 0);
    }

    #[test]
    fn a_must_without_a_citation_and_a_citation_without_a_must_are_refused() {
        let document = ("src/wire/PROTOCOL.md", "<a id=\"must-bound-length\"></a> A receiver MUST. See #must-bound-length.");
        let citing = ("src/wire/frame.rs", "// SPEC: PROTOCOL.md#must-bound-length\n");
        assert_eq!(anchors(&tree(&[document]), &[]).len(), 1);
        assert_eq!(anchors(&tree(&[citing]), &[]).len(), 1);
        assert!(anchors(&tree(&[citing]), &["src/wire/PROTOCOL.md"]).is_empty());
        assert!(anchors(&tree(&[document, citing]), &[]).is_empty());
        assert_eq!(
            anchors(&tree(&[document, ("src/a.rs", "let x = \"SPEC: PROTOCOL.md#must-bound-length\";")]), &[]).len(),
            1,
            "not a comment"
        );
    }

    #[test]
    fn a_module_that_does_not_exist_is_refused() {
        let wire = ("src/wire/mod.rs", "");
        let check =
            |text: &str| architecture(&tree(&[wire, ("config/gateway.toml", ""), ("ARCHITECTURE.md", text)]), &["src/storage"]).len();
        assert_eq!(check("`wire/` and `src/wire/mod.rs`, `config/`, storage/ and/or src/wire."), 0);
        assert_eq!(check("  durable/   2   records"), 1);
        assert_eq!(check("`src/wire/gone.rs`"), 1);
        assert_eq!(arrived(&tree(&[wire]), &["src/wire", "src/storage"]).len(), 1);
        assert_eq!(architecture(&tree(&[wire]), &[]).len(), 1);
    }

    #[test]
    fn a_link_that_leads_nowhere_is_refused() {
        let check = |text: &str| links(&tree(&[("src/wire/mod.rs", ""), ("docs/a.md", text)]), &["docs/b.md"]).len();
        assert_eq!(check("[x](../src/wire/mod.rs) [y](../src/wire/) [z](#here) [b](b.md#there) [w](https://example.net/c)"), 0);
        assert_eq!(check("[x](src/wire/mod.rs) [c](c.md)"), 2);
    }

    #[test]
    fn a_state_that_the_document_does_not_explain_is_refused() {
        let matrix = ("src/migration/transitions.txt", "Every state.\n\nSOURCE\noffered  give-up  => aborted\noffered  FINAL  -\n");
        assert_eq!(states(&tree(&[matrix, ("ARCHITECTURE.md", "offered")])).len(), 1);
        assert!(states(&tree(&[matrix, ("ARCHITECTURE.md", "\n| `offered` | runs |")])).is_empty());
    }

    #[test]
    fn a_promise_whose_test_does_not_exist_is_refused() {
        let test = ("src/a.rs", "#[cfg(test)]\nmod tests {\n    #[test]\n    fn it_holds() {}\n}\n// fn it_is_only_said() {}");
        let check = |text: &str| promises(&tree(&[test, ("SECURITY.md", text)])).len();
        assert_eq!(check("Safe (test: `it_holds`)."), 0);
        assert_eq!(check("Safe (test: `it_holds`, `it_is_only_said`)."), 1);
    }

    #[test]
    fn leftovers_are_refused() {
        for word in LEFTOVERS {
            check(leftovers, "src/wire/frame.rs", &format!("// {word} x"), 1);
            check(leftovers, "Cargo.lock", word, 0);
        }
        check(leftovers, "a.sh", &format!("mktemp a.X{}XX; cd net{}x", LEFTOVERS[2], LEFTOVERS[7]), 0);
        check(leftovers, "src/a.rs", concat!("#[ig", "nore = \"needs a second host\"]"), 0);
    }

    #[test]
    fn a_name_that_says_nothing_is_refused() {
        check(file_names, "src/wire/utils.rs", "", 1);
        check(file_names, "tests/common/mod.rs", "", 1);
        check(file_names, "src/wire/frame.rs", "", 0);
    }

    #[test]
    fn a_bound_without_a_reason_is_refused() {
        check(limits, "src/limits.rs", "/// LIMIT: why\npub const A: u8 = 1;\n/// B\npub const B: u8 = 2;", 1);
        check(limits, "src/limits.rs", "/// LIMIT: why\n/// and more\n#[allow(x)]\npub const A: u8 = 1;\npub const fn f() {}", 0);
        check(limits, "src/wire/frame.rs", "pub const FRAMES_MAX: u8 = 1;\n    pub const ALL: u8 = 1;", 1);
        check(limits, "src/engine/mod.rs", "pub const FRAMES_MAX: u8 = 1;", 0);
    }
}
