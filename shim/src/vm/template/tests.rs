use tempfile::TempDir;

use super::*;

/// A node with a guest, and 64 MiB for it.
fn node() -> (TempDir, Config) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["podvmm", "kernel", "initramfs"] {
        fs::write(folder.path().join(name), name).unwrap();
    }
    let at = |name: &str| folder.path().join(name).display().to_string();
    let text = format!(
        "podvmm = '{}'\nkernel = '{}'\ninitramfs = '{}'\ntemplates = '{}'\nmax_memory_mib = 16384",
        at("podvmm"),
        at("kernel"),
        at("initramfs"),
        at("templates"),
    );
    let config = toml::from_str(&text).unwrap();
    (folder, config)
}

fn sized(memory_mib: u64) -> Size {
    Size {
        vcpus: 2,
        memory_mib,
    }
}

fn for_pod(config: &Config) -> Option<Template> {
    Template::for_pod(config, sized(576), 1)
}

fn made(template: &Template) {
    let _claim = template.claim().unwrap();
    written(template);
}

/// The shim that has claimed it has made it.
fn written(template: &Template) {
    let new = template.folder().join("new");
    fs::write(&new, "").unwrap();
    fs::rename(new, template.folder().join(STATE)).unwrap();
}

#[test]
fn what_is_made_takes_the_place_of_what_was_there() {
    let (_folder, config) = node();
    let template = for_pod(&config).unwrap();
    let claim = template.claim().unwrap();
    let (folder, making) = (template.folder(), claim.making());
    for old in ["memory-old", "memory-both", "failures"] {
        fs::write(folder.join(old), "old").unwrap();
    }
    for new in ["memory-both", "memory-new", "config.json", STATE] {
        fs::write(making.join(new), "new").unwrap();
    }
    adopt(&making, folder).unwrap();
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "config.json",
        "failures",
        INPUTS,
        "memory-both",
        "memory-new",
        STATE,
    ];
    assert_eq!(names, expected);
    // What podvmm keeps the right to write to is gone.
    assert!(!making.exists() && template.is_ready());
    assert_eq!(fs::read(folder.join("memory-both")).unwrap(), b"new");
}

#[test]
fn a_pod_goes_on_from_the_largest_vm_that_is_not_larger() {
    let (_folder, config) = node();
    let memory = |mib| Template::of(&config, sized(mib), 1).map(|it| it.size.memory_mib);
    let sizes = [79, 80, 576, 1000, 8192].map(memory);
    assert_eq!(sizes, [None, Some(80), Some(576), Some(576), Some(4160)]);
    assert_eq!(Template::of(&config, sized(576), 1).unwrap().size.vcpus, 1);
    let folders = [0, 1, 2].map(|interfaces| Template::of(&config, sized(576), interfaces));
    let folders = folders.map(|template| template.unwrap().folder);
    assert!(folders[0] != folders[1] && folders[1] != folders[2]);
    let mut without = config.clone();
    without.templates = None;
    assert!(Template::of(&without, sized(576), 1).is_none());
}

#[test]
fn one_shim_makes_it_and_the_others_use_it() {
    let (_folder, config) = node();
    let [one, other] = [0; 2].map(|_| Template::of(&config, sized(576), 1).unwrap());
    let claim = one.claim().unwrap();
    assert!(other.claim().is_none());
    drop(claim);
    assert!(!other.is_ready());
    made(&one);
    assert!(other.is_ready());
    // As a pod finds it that looked before it was there.
    assert!(other.claim().is_none());
    assert!(other.is_ready());
}

#[test]
fn what_is_being_made_is_waited_for_and_made_by_another_if_its_maker_is_gone() {
    let (_folder, config) = node();
    let [one, other] = [0; 2].map(|_| Template::of(&config, sized(576), 1).unwrap());
    let moment = Duration::from_millis(1);
    let long = Duration::from_secs(60);
    let Way::Model(claim) = one.way(moment) else {
        panic!("no other shim makes it");
    };
    assert!(matches!(other.way(moment), Way::Boot), "it takes too long");
    thread::scope(|scope| {
        let waits = scope.spawn(|| other.way(long));
        thread::sleep(PAUSE);
        assert!(!waits.is_finished());
        drop(claim);
        let Way::Model(claim) = waits.join().unwrap() else {
            panic!("its maker is gone");
        };
        let waits = scope.spawn(|| one.way(long));
        written(&other);
        drop(claim);
        assert!(matches!(waits.join().unwrap(), Way::Clone(_)));
    });
}

/// Clones of the template's snapshot fail, as of several shims.
fn fail(config: &Config, times: usize) {
    for _ in 0..times {
        let template = Template::of(config, sized(576), 1).unwrap();
        let snapshot = template.snapshot();
        template.failed(&snapshot.unwrap(), "it is bad");
    }
}

#[test]
fn one_failure_is_not_the_end_of_a_template_and_a_success_makes_up_for_it() {
    let (_folder, config) = node();
    let template = Template::of(&config, sized(576), 1).unwrap();
    made(&template);
    for _ in 0..10 {
        fail(&config, MAX_FAILURES - 1);
        assert!(template.is_ready() && template.claim().is_none());
        assert_eq!(for_pod(&config).as_ref(), Some(&template));
        template.worked();
    }
    assert!(template.is_ready());
}

#[test]
fn repeated_failures_set_it_aside_until_it_is_made_anew() {
    let (_folder, config) = node();
    let template = Template::of(&config, sized(576), 1).unwrap();
    made(&template);
    fail(&config, MAX_FAILURES);
    assert!(!template.is_ready());
    // The next pod boots and makes it. Meanwhile it may be killed, and then another does.
    let pods = for_pod(&config).unwrap();
    drop(pods.claim().unwrap());
    assert!(!template.is_ready());
    made(&pods);
    assert!(template.is_ready());
    // The second time it has to wait, whichever pod asks.
    fail(&config, MAX_FAILURES);
    assert!(!template.is_ready());
    assert!(for_pod(&config).is_none() && template.claim().is_none());
    // But it does not have to wait if a user asks for it.
    template.start_over();
    assert!(for_pod(&config).is_some());
    made(&template);
    template.start_over();
    assert!(
        template.is_ready(),
        "it is left alone where nothing is wrong"
    );
    fail(&config, 1);
    template.start_over();
    assert!(template.is_ready());
}

#[test]
fn a_late_failure_of_an_older_snapshot_does_not_count_for_the_new_one() {
    let (_folder, config) = node();
    let template = Template::of(&config, sized(576), 1).unwrap();
    made(&template);
    let older = template.snapshot().unwrap();
    fail(&config, MAX_FAILURES);
    made(&template);
    assert_ne!(template.snapshot().unwrap(), older);
    template.failed(&older, "late");
    fail(&config, MAX_FAILURES - 1);
    assert!(template.is_ready());
}

#[test]
fn a_failure_that_cannot_be_counted_removes_the_snapshot() {
    let (_folder, config) = node();
    let template = Template::of(&config, sized(576), 1).unwrap();
    made(&template);
    let snapshot = template.snapshot().unwrap();
    // Stands for a disk on which nothing can be written.
    fs::create_dir(template.folder().join("failures")).unwrap();
    template.failed(&snapshot, "it is bad");
    assert!(!template.is_ready());
}

#[test]
fn what_is_made_of_something_else_is_none() {
    let (_folder, config) = node();
    let template = Template::of(&config, sized(576), 1).unwrap();
    made(&template);
    // Another's, whose inputs have the same hash.
    fs::write(template.folder().join(INPUTS), "{}").unwrap();
    assert!(!template.is_ready());
    let claim = template.claim().unwrap();
    assert!(!template.is_ready(), "it is not made yet");
    drop(claim);
}

#[test]
fn it_is_another_when_what_it_is_made_of_changes_and_stale_ones_go() {
    let (_folder, config) = node();
    let before = Template::of(&config, sized(576), 1).unwrap();
    made(&before);
    let mut params = config.clone();
    params.kernel_params = "debug".into();
    assert!(!Template::of(&params, sized(576), 1).unwrap().is_ready());
    fs::write(&config.kernel, "another kernel").unwrap();
    let after = Template::of(&config, sized(576), 1).unwrap();
    assert_ne!(after.folder(), before.folder());
    assert!(!after.is_ready());
    made(&after);
    remove_stale(after.folder().parent().unwrap());
    assert!(!before.folder().exists());
    assert!(after.is_ready());
}

/// A guest keeps the policy that it booted with, and so does each of its clones.
#[test]
fn a_template_is_of_one_policy() {
    let (_folder, config) = node();
    let with = |policy: &str| {
        let mut config = config.clone();
        config.policy = Some(policy.parse().unwrap());
        for_pod(&config).unwrap()
    };
    let open = for_pod(&config).unwrap();
    let empty = with("podvmm policy 1\n");
    let closed = with("podvmm policy 1\ndevices:\n");
    made(&closed);
    assert!(closed.is_ready());
    for other in [&open, &empty] {
        assert_ne!(other.folder(), closed.folder());
        assert!(!other.is_ready());
    }
    assert_eq!(with("podvmm policy 1\ndevices:\n"), closed);
}
