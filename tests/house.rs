//! The house keeps its order: rooms use those below them alone, and files do not go round in circles.
//!
//! A room is a module of a crate's root. What a file uses is what it names by `crate::`, `super::` and
//! `self::`, its tests aside. A module and those within it may use one another: they are one thing in parts.

#![expect(
    clippy::unwrap_used,
    reason = "the source is there, and its names are plain"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The most rooms that a newcomer looks through.
const MOST_ROOMS: usize = 10;

/// What each file's module uses, by paths without `crate`.
type Uses = BTreeMap<Vec<String>, BTreeSet<Vec<String>>>;

#[test]
fn rooms_and_files_use_those_below_them() {
    for source in ["vmm/src", "shim/src", "api/src"] {
        let uses = uses(source);
        let rooms = rooms(&uses);
        let names: Vec<_> = rooms.keys().map(|room| room[0].as_str()).collect();
        assert!(
            names.len() <= MOST_ROOMS,
            "{source} has more rooms: {names:?}"
        );
        assert_eq!(circle(&rooms), None, "rooms of {source}");
    }
    for source in [
        "vmm/src",
        "shim/src",
        "agent/src",
        "api/src",
        "arch/src",
        "devices/src",
        "protocol/src",
    ] {
        let mut uses = uses(source);
        for (file, used) in &mut uses {
            used.retain(|other| !file.starts_with(other) && !other.starts_with(file));
        }
        assert_eq!(circle(&uses), None, "files of {source}");
    }
}

#[test]
fn a_circle_is_found() {
    let name = |word: &str| vec![word.to_owned()];
    let of = |pairs: &[(&str, &[&str])]| -> Uses {
        let used = |words: &[&str]| words.iter().map(|word| name(word)).collect();
        pairs
            .iter()
            .map(|(user, words)| (name(user), used(words)))
            .collect()
    };
    let straight = of(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])]);
    assert_eq!(circle(&straight), None);
    let round = of(&[("a", &["b"]), ("b", &["c"]), ("c", &["b"])]);
    assert_eq!(circle(&round).as_deref(), Some("b -> c -> b"));
    let text = "use crate::a::{b, c::D};\nuse super::e;\nlet x = self::f::g();\nuse crate::{h, i::{j, k}};";
    let here = ["m".to_owned(), "n".to_owned()];
    let named: Vec<_> = named(text, &here)
        .iter()
        .map(|path| path.join("::"))
        .collect();
    let expected = ["a::b", "a::c::D", "m::e", "m::n::f::g", "h", "i::j", "i::k"];
    assert_eq!(named, expected);
}

/// What each file below `source` uses of the others.
fn uses(source: &str) -> Uses {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .join(source);
    let mut texts = BTreeMap::new();
    for path in files(&root, &["rs"]) {
        let module = path.strip_prefix(&root).unwrap().with_extension("");
        let module: Vec<_> = module
            .iter()
            .map(|part| part.to_str().unwrap().to_owned())
            .collect();
        let last = module.last().unwrap().as_str();
        if module.contains(&"tests".into()) || module.len() == 1 && matches!(last, "main" | "lib") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let code = text
            .split("#[cfg(test)]\nmod tests")
            .next()
            .unwrap()
            .to_owned();
        texts.insert(module, code);
    }
    let known = |mut path: Vec<String>| {
        while !path.is_empty() && !texts.contains_key(&path) {
            path.pop();
        }
        path
    };
    let uses = texts.iter().map(|(module, text)| {
        let used = named(text, module).into_iter().map(known);
        let used = used
            .filter(|path| !path.is_empty() && path != module)
            .collect();
        (module.clone(), used)
    });
    uses.collect()
}

/// The files below a folder whose names end so.
fn files(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, endings));
        } else if path
            .extension()
            .is_some_and(|it| endings.iter().any(|ending| it == *ending))
        {
            found.push(path);
        }
    }
    found
}

/// The paths that a module's text names from the crate's root, from its parent or from itself.
fn named(text: &str, here: &[String]) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for (start, _) in text.match_indices("::") {
        let before = &text[..start];
        let word_start = before
            .rfind(|c: char| !is_of_word(c))
            .map_or(0, |at| at + 1);
        let outer = before[..word_start].ends_with("::");
        let base = match &before[word_start..] {
            "crate" => Vec::new(),
            "self" if !outer => here.to_vec(),
            "super" if !outer => here[..here.len() - 1].to_vec(),
            _ => continue,
        };
        tree(&mut text[start + 2..].chars().peekable(), &base, &mut all);
    }
    all
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Reads a path, or a tree of them in braces, and adds each with what stands before it.
fn tree(
    text: &mut std::iter::Peekable<std::str::Chars<'_>>,
    base: &[String],
    all: &mut Vec<Vec<String>>,
) {
    let mut path = base.to_vec();
    loop {
        while text.next_if(|c| c.is_whitespace()).is_some() {}
        if text.next_if_eq(&'{').is_some() {
            loop {
                tree(text, &path, all);
                while text.next_if(|c| c.is_whitespace() || *c == ',').is_some() {}
                match text.peek() {
                    Some('}') => break,
                    None => return,
                    // Not a list of paths.
                    Some(c) if !is_of_word(*c) => return,
                    Some(_) => {}
                }
            }
            text.next();
            return;
        }
        let mut word = String::new();
        while let Some(c) = text.next_if(|c| is_of_word(*c)) {
            word.push(c);
        }
        match word.as_str() {
            "" | "self" => {}
            "super" => drop(path.pop()),
            _ => path.push(word),
        }
        if text.next_if_eq(&':').is_none() || text.next_if_eq(&':').is_none() {
            break;
        }
    }
    all.push(path);
}

/// What the rooms use of one another.
fn rooms(uses: &Uses) -> Uses {
    let mut rooms = Uses::new();
    for (file, used) in uses {
        let room = &file[..1];
        let others = used
            .iter()
            .map(|path| path[..1].to_vec())
            .filter(|other| other != room);
        rooms.entry(room.to_vec()).or_default().extend(others);
    }
    rooms
}

/// A way from somewhere back to it, if there is one.
fn circle(uses: &Uses) -> Option<String> {
    let mut left = uses.clone();
    // What uses nothing that is left is in no circle.
    loop {
        let present: BTreeSet<_> = left.keys().cloned().collect();
        left.values_mut()
            .for_each(|used| used.retain(|other| present.contains(other)));
        let before = left.len();
        left.retain(|_, used| !used.is_empty());
        if left.len() == before {
            break;
        }
    }
    let mut way = vec![left.keys().next()?];
    loop {
        let next = left[*way.last()?].first()?;
        if let Some(start) = way.iter().position(|step| *step == next) {
            let steps = way[start..]
                .iter()
                .chain([&next])
                .map(|step| step.join("::"));
            return Some(steps.collect::<Vec<_>>().join(" -> "));
        }
        way.push(next);
    }
}

/// Words of an earlier dialect of this project's. Its field has its own: snapshotted, restored from; and a sentence
/// names its subject: the client, the driver, another thread.
#[test]
fn the_words_are_the_fields() {
    const DIALECT: [&str; 14] = [
        "/// Why.",
        "written down",
        "goes on from",
        "went on from",
        "nobody",
        "Nobody",
        "somebody",
        "Somebody",
        "anybody",
        "Anybody",
        "everybody",
        "Everybody",
        "whoever",
        "Whoever",
    ];
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folders = [
        "api", "agent", "arch", "benches", "devices", "docs", "protocol", "shim", "tests", "vmm",
    ];
    let all = folders
        .iter()
        .flat_map(|folder| files(&workspace.join(folder), &["rs", "md", "proto"]));
    for path in all.filter(|path| !path.ends_with("tests/house.rs")) {
        let text = fs::read_to_string(&path).unwrap();
        for (number, line) in text.lines().enumerate() {
            let found = DIALECT.iter().find(|words| line.contains(**words));
            assert_eq!(found, None, "{}:{}", path.display(), number + 1);
        }
    }
}

/// A kind of part touches few places: its folder, its configuration, where it is built and where it is resized.
#[test]
fn a_device_is_named_in_few_files() {
    const MOST: usize = 8;
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folders = ["api", "arch", "devices", "protocol", "shim", "vmm"];
    let sources = folders
        .iter()
        .flat_map(|folder| files(&workspace.join(folder), &["rs"]));
    let named: Vec<_> = sources
        .filter(|path| {
            let path = path.to_string_lossy();
            !["/virtio/balloon/", "/tests", "/hostile.rs"]
                .iter()
                .any(|other| path.contains(other))
        })
        .filter(|path| fs::read_to_string(path).unwrap().contains("alloon"))
        .collect();
    assert!(named.len() <= MOST, "balloons are named in {named:?}");
}

/// What is named as a dependency is used, and each package is there in one version: of those of rust-vmm another
/// one would have types of its own.
#[test]
fn dependencies_are_used_and_there_once() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let read = |path: &str| -> toml::Table {
        fs::read_to_string(workspace.join(path))
            .unwrap()
            .parse()
            .unwrap()
    };
    let members = &read("Cargo.toml")["workspace"]["members"];
    for member in members.as_array().unwrap() {
        let member = member.as_str().unwrap();
        let manifest = read(&format!("{member}/Cargo.toml"));
        let texts = files(&workspace.join(member), &["rs"])
            .into_iter()
            .map(|path| fs::read_to_string(path).unwrap());
        let source: String = texts.collect();
        let words: BTreeSet<_> = source.split(|c: char| !is_of_word(c)).collect();
        let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
        let tables = kinds
            .iter()
            .filter_map(|kind| manifest.get(*kind)?.as_table());
        for name in tables.flat_map(toml::Table::keys) {
            assert!(
                words.contains(name.replace('-', "_").as_str()),
                "{member} does not use {name}"
            );
        }
    }
    let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in read("Cargo.lock")["package"].as_array().unwrap() {
        let text = |key: &str| package[key].as_str().unwrap().to_owned();
        versions
            .entry(text("name"))
            .or_default()
            .push(text("version"));
    }
    // What others bring: vmm-sys-util's flags, and two ages of what derives code.
    versions.retain(|name, versions| {
        versions.len() > 1 && !matches!(name.as_str(), "bitflags" | "syn")
    });
    assert!(versions.is_empty(), "{versions:?}");
}
