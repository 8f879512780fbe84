//! What programs do to many files, and several programs to one.

use tests::host::Size;

use crate::{Bench, same_as_runc};

/// Seconds that a pod's containers write to one database.
const SECONDS: Size = Size {
    real: 60,
    emulated: 5,
};

/// Files in a repository.
const REPOSITORY: Size = Size {
    real: 5000,
    emulated: 100,
};

/// Files in a folder tree.
const FILES: Size = Size {
    real: 200_000,
    emulated: 2000,
};

/// Writers of two containers lose nothing of each other's, and leave a database without faults.
#[test]
fn two_containers_write_to_one_sqlite_database() {
    same_as_runc("sqlite", |bench| {
        let ids = ["one", "two"].map(|name| bench.waiting(name, &["data"]));
        let prepare = "sqlite3 /data/db 'pragma journal_mode = wal;
            create table t (writer text, n integer, filler text); create index i on t (writer, n);'";
        let mode = bench.sh("a database", &ids[0], prepare);
        let [one, two] = ["one", "two"].map(|name| writer(name, SECONDS.here()));
        let written = bench.at_once("both write", [(&ids[0], &one), (&ids[1], &two)]);
        let check = "sqlite3 /data/db 'pragma integrity_check;
            select max(n) from t group by writer order by writer;'";
        let checked = bench.sh("it is checked", &ids[0], check);
        eprintln!("rows by writer: {written:?}");
        assert_eq!(checked, format!("ok\n{}", written.join("\n")));
        vec![mode]
    });
}

/// Adds ten rows at a time, by a program that comes and goes, for some seconds and twice at least; prints how
/// many. Each time it looks whether all that it wrote before is there.
fn writer(name: &str, seconds: usize) -> String {
    format!(
        "n=0 end=$(($(date +%s) + {seconds}))
         while [ $n -lt 20 ] || [ $(date +%s) -lt $end ]; do
             rows= first=$n
             for i in 1 2 3 4 5 6 7 8 9 10; do
                 n=$((n + 1))
                 rows=\"$rows insert into t values ('{name}', $n, hex(randomblob(100)));\"
             done
             found=$(sqlite3 -bail -cmd '.timeout 60000' /data/db \"
                 select count(*) from t where writer = '{name}'; begin immediate; $rows commit;\")
             [ \"$found\" = $first ] || {{ echo \"$found rows instead of $first\"; exit 1; }}
         done
         echo $n"
    )
}

/// A repository is made, cloned, packed and checked; the clones' files are its files.
#[test]
fn git_clones_packs_and_checks() {
    same_as_runc("git", |bench| {
        let id = bench.waiting("git", &["data"]);
        let settings = "git config --global user.name x; git config --global user.email x@localhost
            git config --global init.defaultBranch main; git config --global gc.auto 0
            git init -q /data/origin";
        bench.sh("a repository", &id, settings);
        let count = REPOSITORY.here();
        let commits = bench.sh("two commits", &id, &two_commits(count));
        let clone = |to: &str, options: &str| {
            let script = format!(
                "git clone -q {options} /data/origin {to} && cd {to}
                 git gc -q --prune=now && git fsck --strict --full && git status --porcelain
                 git rev-parse HEAD && ls -A .git/objects/pack | wc -l
                 find . -path ./.git -prune -o -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"
            );
            bench.sh(&format!("a clone in {to}"), &id, &script)
        };
        vec![
            commits,
            clone("/data/linked", ""),
            clone("/root/copied", "--no-local"),
        ]
    });
}

/// Makes files that differ, and then changes, renames and removes some.
fn two_commits(count: usize) -> String {
    format!(
        r#"cd /data/origin
        export GIT_AUTHOR_DATE='2000-01-01T00:00:00Z' GIT_COMMITTER_DATE='2000-01-01T00:00:00Z'
        commit() {{ git add --all && git commit -q -m "$1" && git rev-parse HEAD; }}
        perl -e 'for my $n (0 .. {count} - 1) {{
            my $d = sprintf "%03d", $n / 100; mkdir $d unless $n % 100;
            open my $f, ">", "$d/$n" or die $!; print $f "line $_ of $n\n" for 1 .. 20 + $n % 50 }}'
        commit one
        perl -e 'for my $n (0 .. {count} - 1) {{
            my $f = sprintf "%03d/%d", $n / 100, $n;
            if ($n % 7 == 0) {{ open my $h, ">>", $f or die $!; print $h "more\n" }}
            elsif ($n % 11 == 0) {{ rename $f, "$f.moved" or die $! }}
            elsif ($n % 13 == 0) {{ unlink $f or die $! }} }}'
        commit two"#
    )
}

/// Many files are made, listed, changed and removed, on a volume and on the container's root.
#[test]
fn many_files_are_listed_changed_and_removed() {
    same_as_runc("files", |bench| {
        let id = bench.waiting("files", &["data"]);
        let count = FILES.here();
        let on = |place: &str, count: usize| tree(bench, &id, place, count);
        [on("/data", count), on("/root", count / 10)].concat()
    });
}

fn tree(bench: &Bench, id: &str, place: &str, count: usize) -> Vec<String> {
    let each = |what: &str, action: &str| {
        let script = format!(
            r#"cd {place} && perl -e 'for my $n (0 .. {count} - 1) {{
                my $d = "d" . int($n / 1000); my $f = "$d/$n"; {action} }}'"#
        );
        bench.sh(&format!("{count} in {place}: {what}"), id, &script)
    };
    let list = |what: &str| {
        let script = format!(
            "cd {place} && find . -type f -printf 'f %m %n %s %T@ %p\\n' \\
                 -o -type l -printf 'l %l %p\\n' -o -printf '%y %m %p\\n' | sort >/tmp/list
             wc -l </tmp/list; sha256sum </tmp/list"
        );
        bench.sh(&format!("{count} in {place}: {what}"), id, &script)
    };
    each(
        "made",
        r#"mkdir $d or die $! unless $n % 1000; open my $h, ">", $f or die "$f: $!";
           print $h "x" x ($n % 100); close $h; utime 1, 1 + $n, $f or die $!"#,
    );
    let made = list("listed");
    each(
        "changed",
        r#"my $k = $n % 6;
           if ($k == 0) { chmod 0600, $f or die $! }
           elsif ($k == 1) { rename $f, "$f.new" or die $! }
           elsif ($k == 2) { link $f, "$f.link" or die $! }
           elsif ($k == 3) { symlink $n, "$f.symlink" or die $! }
           elsif ($k == 4) { truncate $f, 7 or die $!; utime 1, 2, $f or die $! }
           else { unlink $f or die $! }"#,
    );
    let changed = list("listed again");
    // Folders are read while what they list goes away.
    let remove = format!(
        r#"cd {place} && perl -e 'my $n = 0; for my $d (glob "d*") {{
            opendir my $h, $d or die $!;
            while (my $f = readdir $h) {{ next if $f =~ /^\.\.?$/; unlink "$d/$f" or die "$d/$f: $!"; $n++ }}
            rmdir $d or die "$d: $!" }} print "$n removed\n"'; ls -A"#
    );
    let removed = bench.sh(&format!("{place}: removed"), id, &remove);
    vec![made, changed, removed]
}
