//! Failpoints: the list has every place, and only places.

use crate::source::File;

/// Where the list is.
const LIST: &str = "src/failpoint.rs";

/// Text between the first two quotes.
fn quoted(text: &str) -> Option<&str> {
    text.split('"').nth(1)
}

/// Names of the list.
pub fn names(text: &str) -> Vec<&str> {
    let list = text.split("ALL: &[&str] = &[").nth(1).and_then(|rest| rest.split("];").next()).unwrap_or_default();
    list.lines().filter_map(quoted).collect()
}

/// Places in the code, by name or by a pattern with `{…}` in it.
fn places(file: &File) -> Vec<(usize, &str)> {
    let place = |line: &'_ str| line.contains("failpoint::hit!(") || line.contains("failpoint::fails!(");
    let lines = file.text.lines().enumerate().filter(move |(_, line)| place(line));
    // The error of a place that can fail comes before its name.
    lines.filter_map(|(index, line)| Some((index + 1, line.rsplit_once('"')?.0.rsplit_once('"')?.1))).collect()
}

fn fits(name: &str, pattern: &str) -> bool {
    match (pattern.split_once('{'), pattern.split_once('}')) {
        (Some((head, _)), Some((_, tail))) => name.len() > head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail),
        _ => name == pattern,
    }
}

/// Places that are not listed, and listed names without a place.
pub fn listed(files: &[File]) -> Vec<String> {
    let Some(list) = files.iter().find(|file| file.path == LIST) else { return vec![format!("{LIST}: missing")] };
    let names = names(&list.text);
    let code = files.iter().filter(|file| file.path.starts_with("src/") && file.path != LIST);
    let places: Vec<_> = code.flat_map(|file| places(file).into_iter().map(|(line, name)| (file.path.as_str(), line, name))).collect();
    let unlisted = places.iter().filter(|(.., pattern)| !names.iter().any(|name| fits(name, pattern)));
    let mut found: Vec<_> = unlisted.map(|(path, line, name)| format!("{path}:{line}: failpoint `{name}` is not in {LIST}")).collect();
    let idle = names.iter().filter(|name| !places.iter().any(|(.., pattern)| fits(name, pattern)));
    found.extend(idle.map(|name| format!("{LIST}: `{name}` is no place in the code")));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_is_not_listed_and_a_name_without_a_place_are_found() {
        let list = |names: &str| File::new(LIST, &format!("const ALL: &[&str] = &[\n{names}\n];\n\"x.y\","));
        let code = File::new(
            "src/engine/a.rs",
            "crate::failpoint::hit!(\"a.b\");\ncrate::failpoint::fails!(Bug(\"f\".into()), \"record.{name}.begin\");",
        );
        assert_eq!(listed(&[list("\"a.b\",\n\"record.run.begin\","), code]).len(), 0);
        let code = File::new("src/engine/a.rs", "crate::failpoint::hit!(\"a.b\");");
        assert_eq!(listed(&[list("\"a.b\",\n\"a.c\","), code]).len(), 1);
        let code = File::new("src/engine/a.rs", "crate::failpoint::hit!(\"a.b\");");
        assert_eq!(listed(&[list(""), code]).len(), 1);
    }
}
