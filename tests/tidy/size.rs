//! Files and functions stay short enough to be read at once.

use crate::source::{File, is_ident, tokens};

/// A file with more lines needs an entry in the ratchet.
pub const FILE_LINES: usize = 600;
/// No file is longer, listed or not.
pub const FILE_LINES_MAX: usize = 1000;
/// A function with more lines needs an entry in the ratchet.
pub const FUNCTION_LINES: usize = 70;
/// An exhaustive match may be this long and no longer.
pub const MATCH_LINES_MAX: usize = 150;
/// An entry in the ratchet follows what it allows this closely.
const SLACK: usize = 20;

/// Long files that are not listed or outgrew their entry, and entries that are too generous.
pub fn files(files: &[File], listed: &[(&str, usize)]) -> Vec<String> {
    let mut found = Vec::new();
    let rust = || files.iter().filter(|file| file.path.ends_with(".rs"));
    for file in rust() {
        let (path, lines) = (&file.path, file.text.lines().count());
        let ceiling = listed.iter().find(|(name, _)| name == path).map_or(FILE_LINES, |(_, ceiling)| *ceiling);
        if lines > ceiling.min(FILE_LINES_MAX) {
            found.push(format!("{path}: {lines} lines: expected at most {}", ceiling.min(FILE_LINES_MAX)));
        }
    }
    for (path, ceiling) in listed {
        match rust().find(|file| file.path == *path).map(|file| file.text.lines().count()) {
            Some(lines) if lines <= FILE_LINES => found.push(format!("LONG_FILES: `{path}` is short now: take it out")),
            Some(lines) if lines + SLACK < *ceiling => found.push(format!("LONG_FILES: `{path}` has {lines} lines: lower {ceiling}")),
            Some(_) => {}
            None => found.push(format!("LONG_FILES: `{path}` does not exist")),
        }
    }
    found
}

/// A function with a body: name, first line, number of lines.
pub fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    for (at, pair) in tokens.windows(2).enumerate() {
        let [keyword, name] = pair else { continue };
        if keyword.text != "fn" || !is_ident(name.text) {
            continue;
        }
        let (mut depth, mut body) = (0_i32, false);
        for token in &tokens[at + 2..] {
            match token.text {
                ";" if depth == 0 => break,
                "(" | "[" => depth += 1,
                "{" => {
                    body |= depth == 0;
                    depth += 1;
                }
                ")" | "]" | "}" => depth -= 1,
                _ => {}
            }
            if body && depth == 0 {
                found.push((name.text.to_owned(), keyword.line, token.line + 1 - keyword.line));
                break;
            }
        }
    }
    found
}

/// Long functions of the program that are not listed or outgrew their entry, and stale entries.
pub fn long_functions(files: &[File], listed: &[(&str, &str, usize)], matches: &[(&str, &str, &str)]) -> Vec<String> {
    let mut found = Vec::new();
    let mut long = Vec::new();
    for file in files.iter().filter(|file| file.path.starts_with("src/")) {
        for (name, line, lines) in functions(&file.production) {
            let path = file.path.as_str();
            let entry = listed.iter().find(|(p, f, _)| (*p, *f) == (path, name.as_str())).map(|entry| entry.2);
            let exception = matches.iter().any(|(p, f, _)| (*p, *f) == (path, name.as_str())).then_some(MATCH_LINES_MAX);
            let ceiling = entry.or(exception).unwrap_or(FUNCTION_LINES);
            if lines > ceiling {
                found.push(format!("{path}:{line}: `{name}` has {lines} lines: expected at most {ceiling}"));
            }
            if lines > FUNCTION_LINES {
                long.push((path, name, lines));
            }
        }
    }
    let longest = |path, name| long.iter().filter(|(p, f, _)| (*p, f.as_str()) == (path, name)).map(|entry| entry.2).max();
    for (path, name, ceiling) in listed {
        match longest(path, name) {
            None => found.push(format!("LONG_FUNCTIONS: `{name}` in `{path}` is short or gone: take it out")),
            Some(lines) if lines + SLACK < *ceiling => found.push(format!("LONG_FUNCTIONS: `{name}` has {lines} lines: lower {ceiling}")),
            Some(_) => {}
        }
    }
    let stale = matches.iter().filter(|(path, name, _)| longest(path, name).is_none());
    found.extend(stale.map(|(path, name, _)| format!("EXHAUSTIVE_MATCHES: `{name}` in `{path}` is short or gone: take it out")));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(lines: usize) -> Vec<File> {
        vec![File::new("src/wire/frame.rs", &"\n".repeat(lines))]
    }

    fn function_of(lines: usize) -> Vec<File> {
        let text = format!("impl X {{\n    fn long(&self) -> [u8; 2] {{{}}}\n    fn short();\n}}", "\n".repeat(lines - 1));
        vec![File::new("src/wire/frame.rs", &text)]
    }

    #[test]
    fn a_long_file_needs_an_entry_that_only_shrinks() {
        let path = "src/wire/frame.rs";
        for (lines, listed, violations) in [
            (600, vec![], 0),
            (601, vec![], 1),
            (700, vec![(path, 700)], 0),
            (701, vec![(path, 700)], 1),
            (650, vec![(path, 700)], 1),
            (600, vec![(path, 620)], 1),
            (1001, vec![(path, 2000)], 2),
            (10, vec![("src/gone.rs", 700)], 1),
        ] {
            let found = files(&file_of(lines), &listed);
            assert_eq!(found.len(), violations, "{lines} {listed:?}: {found:?}");
        }
    }

    #[test]
    fn a_long_function_needs_an_entry_that_only_shrinks() {
        let path = "src/wire/frame.rs";
        for (lines, listed, matches, violations) in [
            (70, vec![], vec![], 0),
            (71, vec![], vec![], 1),
            (80, vec![(path, "long", 80)], vec![], 0),
            (81, vec![(path, "long", 80)], vec![], 1),
            (75, vec![(path, "long", 100)], vec![], 1),
            (70, vec![(path, "long", 80)], vec![], 1),
            (140, vec![], vec![(path, "long", "one table")], 0),
            (151, vec![], vec![(path, "long", "one table")], 1),
            (20, vec![], vec![(path, "long", "one table")], 1),
        ] {
            let found = long_functions(&function_of(lines), &listed, &matches);
            assert_eq!(found.len(), violations, "{lines} {listed:?} {matches:?}: {found:?}");
        }
    }

    #[test]
    fn functions_are_measured_from_the_keyword_to_the_brace() {
        let code =
            "fn a(x: [u8; 2]) -> u8\nwhere\n    T: Fn() -> u8,\n{\n    if x { y }\n}\ntrait T { fn b(); fn c() { } }\ntype F = fn(u8);";
        assert_eq!(functions(code), [("a".to_owned(), 1, 6), ("c".to_owned(), 7, 1)]);
    }
}
