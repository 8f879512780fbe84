//! Generates the messages from the texts in `proto`. Each package is the module of its name.

use std::error::Error;

use prost_build::Config;

const TEXTS: [&str; 9] = [
    "agent/figures.proto",
    "agent/messages.proto",
    "agent/oci.proto",
    "agent/types.proto",
    "containerd/bootstrap.proto",
    "containerd/events.proto",
    "containerd/figures.proto",
    "containerd/task.proto",
    "ttrpc/messages.proto",
];

/// The package whose messages are also read from JSON.
const OCI: &str = "agent.oci";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(TEXTS, ["proto"])?;
    let mut config = Config::new();
    config.btree_map(["."]);
    config.message_attribute(
        ".containerd.bootstrap.BootstrapResult",
        "#[derive(serde::Serialize)]",
    );
    config.message_attribute(
        format!(".{OCI}"),
        "#[derive(serde::Deserialize)]\n#[serde(default)]",
    );
    let oci = descriptors.file.iter().filter(|file| file.package() == OCI);
    for message in oci.flat_map(|file| &file.message_type) {
        for field in &message.field {
            let path = format!(".{OCI}.{}.{}", message.name(), field.name());
            config.field_attribute(path, format!("#[serde(rename = {:?})]", field.json_name()));
        }
    }
    for number in ["major", "minor"] {
        let path = format!(".{OCI}.LinuxDeviceCgroup.{number}");
        config.field_attribute(path, "#[serde(default = \"any_number\")]");
    }
    config.compile_fds(descriptors)?;
    Ok(())
}
