//! Lies while a pod is made.

use std::thread;
use std::time::Duration;

use crate::pod::Pod;

/// The calls by which a pod with an interface is made, in their order.
const CALLS: [&str; 8] = [
    "SetGuestDateTime",
    "UpdateInterface",
    "UpdateRoutes",
    "AddARPNeighbors",
    "CreateSandbox",
    "GetGuestDetails",
    "CreateContainer",
    "StartContainer",
];

/// A guest that says nonsense, or hangs up, has no pod.
pub(crate) fn from_failing_guests() {
    let lies = [
        "garbage",
        "refused",
        "longer",
        "half",
        "halfheader",
        "closed",
    ];
    for_each(&lies, |pod| {
        let made = pod.create(&pod.id).and_then(|_| pod.begin(&pod.id, ""));
        assert!(made.is_err(), "{}", pod.id);
        None
    });
}

/// A guest that says nothing is not waited for when its pod is to end.
pub(crate) fn from_stalling_guests() {
    for_each(&["never", "announced", "endless", "deaf"], |pod| {
        thread::scope(|scope| {
            let made = scope.spawn(|| pod.create(&pod.id).and_then(|_| pod.begin(&pod.id, "")));
            thread::sleep(Duration::from_millis(700));
            assert!(!made.is_finished(), "{}", pod.id);
            let vmm = pod.order_shutdown();
            made.join().unwrap().unwrap_err();
            vmm
        })
    });
}

/// An agent may lie as it likes before it is first understood.
pub(crate) fn from_guests_that_come_late() {
    let lies = "Check=garbage,mistyped,deep,large,longer,refused,half,halfheader,closed,others,twice,kinds,late:1000";
    Pod::running("late", lies).end();
    let silent = Pod::start("silent", "Check=announced");
    let why = silent.create("silent").unwrap_err();
    assert!(why.contains("does not answer within 4s"), "{why}");
    silent.shut_down();
}

/// Makes a pod `with` each of the lies in answer to each of the calls. Nothing may be left then. `with` returns what
/// stood for podvmm if it has told the shim to end.
fn for_each(lies: &[&'static str], with: impl Fn(&Pod) -> Option<u32> + Sync) {
    let of_one = |lie: &str| {
        let network = network();
        for call in CALLS {
            let (id, lies) = (format!("{call}-{lie}"), format!("{call}={lie}"));
            let pod = Pod::with_network(&id, &lies, Some(&network));
            let vmm = with(&pod).or_else(|| pod.order_shutdown());
            pod.leaves_nothing(vmm);
        }
    };
    thread::scope(|scope| {
        let of_one = &of_one;
        let start = |lie: &&'static str| {
            let lie = *lie;
            scope.spawn(move || of_one(lie))
        };
        let threads: Vec<_> = lies.iter().map(start).collect();
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// The path of this thread's network, which has one interface from now on.
fn network() -> String {
    // SAFETY: it changes nothing but which network this thread sees.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "networks of their own need root");
    tests::network::ip("link add eth0 type veth peer far0");
    for link in ["lo", "eth0", "far0"] {
        tests::network::ip(&format!("link set {link} up"));
    }
    tests::network::ip("address add 10.88.0.2/24 dev eth0");
    tests::network::ip("route add default via 10.88.0.1");
    tests::network::ip("neighbor add 10.88.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent");
    let thread = rustix::thread::gettid().as_raw_nonzero();
    format!("/proc/{}/task/{thread}/ns/net", std::process::id())
}
