//! A container is kept apart from what started it. The same is asked of runc's.

use tests::containerd::Ran;
use tests::ctr::Container;
use tests::guest;
use tests::node::step;

use super::on_a_node;

#[test]
fn a_container_reaches_nothing_but_itself() {
    on_a_node(|node| {
        let container = Container::new(node, "apart");
        let program = guest::guest_load().display();
        let mount = format!("type=bind,src={program},dst=/reach,options=bind:ro");
        // A node's own port of that number is free.
        let port = if node.is_podvmm() { "1024" } else { "0" };
        let mut command = container.run(
            &node.containerd,
            &["--rm", "--mount", &mount],
            &["/reach", "reach", port],
        );
        let ran: Ran = step("ctr run", || command.output().unwrap()).into();
        assert_eq!((ran.stdout.as_str(), ran.code), ("", Some(0)), "{ran:?}");
    });
}
