//! A VM as Cloud Hypervisor's clients define it, in JSON.
//!
//! Fields nobody here knows are ignored, as they are there. A field we know and cannot honour is
//! refused by name, unless it asks for what is so anyway.

mod parts;
mod unsupported;
mod written;

use std::os::fd::OwnedFd;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::config::{
    ConfigError, CpusConfig, DiskConfig, FsConfig, MemoryConfig, NetConfig, Output, VmConfig,
    VsockConfig,
};
use crate::error::JsonError;
use crate::request::Resize;
use crate::units::ByteSize;

use self::parts::{DiskJson, FsJson, NetJson, VmJson, VsockJson};

/// What a client defined, and what it means. Both change together, or not at all.
#[derive(Clone, Debug)]
pub struct Definition {
    config: VmConfig,
    /// As the client wrote it, with defaults for what Kata's clients read back.
    json: Value,
}

impl Definition {
    /// What it means.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// What `vm.info` and a snapshot's config.json say of it.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// A VM that was not defined in JSON.
    pub fn of(config: VmConfig) -> Self {
        let mut vm = written::vm(&config);
        fill_in(&mut vm, &config);
        Self {
            config,
            json: Value::Object(vm),
        }
    }

    /// Understands the body of vm.create.
    pub fn parse(body: &[u8]) -> Result<Self, JsonError> {
        Self::understand(parse(body)?, Vec::new())
    }

    /// Understands the config.json of a snapshot, with what `patch` changes in it (RFC 7396, JSON
    /// Merge Patch). `fds` stand for the taps of networks without one, in their order.
    pub fn restored(body: &[u8], patch: &Value, fds: Vec<OwnedFd>) -> Result<Self, JsonError> {
        let mut json = parse(body)?;
        merge(&mut json, patch);
        Self::understand(json, fds)
    }

    fn understand(mut json: Value, fds: Vec<OwnedFd>) -> Result<Self, JsonError> {
        unsupported::refuse(&json)?;
        let vm: VmJson = from_value(json.clone())?;
        let config = vm.config(fds)?;
        if let Value::Object(object) = &mut json {
            fill_in(object, &config);
        }
        Ok(Self { config, json })
    }
}

/// A device to be added to a VM.
#[derive(Clone, Debug)]
pub enum Addition {
    Disk(DiskConfig),
    Fs(FsConfig),
    Net(NetConfig),
    Vsock(VsockConfig),
}

impl Addition {
    /// Understands the body of vm.add-disk.
    pub fn disk(body: &[u8]) -> Result<(Self, Value), JsonError> {
        let (disk, json) = addition::<DiskJson>(body, "disks")?;
        Ok((Self::Disk(disk.config()?), json))
    }

    /// Understands the body of vm.add-fs.
    pub fn fs(body: &[u8]) -> Result<(Self, Value), JsonError> {
        let (fs, json) = addition::<FsJson>(body, "fs")?;
        Ok((Self::Fs(fs.config()?), json))
    }

    /// Understands the body of vm.add-net; `fds` came with it and stand for the tap.
    pub fn net(body: &[u8], fds: Vec<OwnedFd>) -> Result<(Self, Value), JsonError> {
        let (net, mut json) = addition::<NetJson>(body, "net")?;
        if let Value::Object(net) = &mut json {
            // Numbers of the client's, which mean nothing here.
            net.remove("fds");
        }
        Ok((Self::Net(net.config(fds)?), json))
    }

    /// Understands the body of vm.add-vsock.
    pub fn vsock(body: &[u8]) -> Result<(Self, Value), JsonError> {
        let (vsock, json) = addition::<VsockJson>(body, "vsock")?;
        Ok((Self::Vsock(vsock.config()?), json))
    }
}

/// One part of a VM, held to the same as in a whole one.
fn addition<T: DeserializeOwned>(body: &[u8], section: &str) -> Result<(T, Value), JsonError> {
    let json: Value = parse(body)?;
    let whole = match section {
        "vsock" => json!({ section: json }),
        _ => json!({ section: [json] }),
    };
    unsupported::refuse(&whole)?;
    Ok((from_value(json.clone())?, json))
}

impl Definition {
    /// Adds a device, of which `json` is what the client wrote.
    pub fn add(&mut self, addition: Addition, json: Value) {
        let config = &mut self.config;
        let section = match addition {
            Addition::Disk(disk) => {
                config.disks.push(disk);
                "disks"
            }
            Addition::Fs(share) => {
                config.shares.push(share);
                "fs"
            }
            Addition::Net(net) => {
                config.nets.push(net);
                "net"
            }
            Addition::Vsock(vsock) => {
                config.vsock = Some(vsock);
                "vsock"
            }
        };
        let Value::Object(vm) = &mut self.json else {
            return;
        };
        match vm.entry(section).or_insert(Value::Null) {
            Value::Array(items) => items.push(json),
            other if section == "vsock" => *other = json,
            other => *other = Value::Array(vec![json]),
        }
        fill_in(vm, &self.config);
    }
}

impl Definition {
    /// Has the VM be of these sizes from now on, also when it boots again. Sizes of devices that it does
    /// not have are left out.
    pub fn resize(&mut self, sizes: Resize) -> Result<(), ConfigError> {
        let VmConfig {
            cpus,
            memory,
            balloon,
            ..
        } = &mut self.config;
        if let Some(count) = sizes.desired_vcpus {
            *cpus = CpusConfig::new(count, cpus.max().get())?;
        }
        if let Some(bytes) = sizes.desired_ram {
            let plugged = ByteSize(bytes.saturating_sub(memory.size.bytes()));
            *memory = MemoryConfig {
                hotplugged_size: plugged,
                ..*memory
            }
            .checked()?;
        }
        if let (Some(bytes), Some(balloon)) = (sizes.desired_balloon, balloon) {
            balloon.size = ByteSize(bytes);
        }
        if let Value::Object(vm) = &mut self.json {
            write_sizes(vm, &self.config);
        }
        Ok(())
    }

    /// Takes away the device that its client calls `id`, or that vm.counters does. False if there is
    /// none.
    pub fn remove(&mut self, id: &str) -> bool {
        let Value::Object(vm) = &mut self.json else {
            return false;
        };
        let called = |json: &Value| json["id"].as_str() == Some(id);
        if vm
            .get("vsock")
            .is_some_and(|vsock| vsock.is_object() && (called(vsock) || id == "vsock"))
        {
            vm.remove("vsock");
            self.config.vsock = None;
            return true;
        }
        for (section, name) in [("disks", "disk"), ("net", "net"), ("fs", "fs")] {
            let Some(Value::Array(items)) = vm.get_mut(section) else {
                continue;
            };
            let found = items
                .iter()
                .enumerate()
                .position(|(index, json)| called(json) || format!("{name}{index}") == id);
            if let Some(index) = found {
                items.remove(index);
                match section {
                    "disks" => drop(self.config.disks.remove(index)),
                    "net" => drop(self.config.nets.remove(index)),
                    _ => drop(self.config.shares.remove(index)),
                }
                return true;
            }
        }
        false
    }
}

/// Parses `body`; an error says where in it.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, JsonError> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(located)?;
    deserializer.end().map_err(|source| JsonError::Value {
        path: ".".into(),
        source,
    })?;
    Ok(value)
}

fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, JsonError> {
    serde_path_to_error::deserialize(value).map_err(located)
}

fn located(error: serde_path_to_error::Error<serde_json::Error>) -> JsonError {
    JsonError::Value {
        path: error.path().to_string(),
        source: error.into_inner(),
    }
}

/// RFC 7396: objects are merged, null takes away, and anything else replaces.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        target.clone_from(patch);
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let target = target.as_object_mut().expect("just made one");
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// Writes `value` in ASCII alone: Kata's Rust client decodes answers piece by piece and panics
/// where a piece ends within a character.
pub(crate) fn ascii(value: &Value) -> String {
    let text = value.to_string();
    if text.is_ascii() {
        return text;
    }
    // Outside strings JSON is ASCII, so what is not is a part of one.
    let mut ascii = String::with_capacity(text.len());
    for char in text.chars() {
        if char.is_ascii() {
            ascii.push(char);
        } else {
            let mut units = [0; 2];
            for unit in char.encode_utf16(&mut units) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}

/// What Kata's Rust client insists on finding.
fn fill_in(vm: &mut Map<String, Value>, config: &VmConfig) {
    write_sizes(vm, config);
    let cpus = section(vm, "cpus");
    default(cpus, "max_vcpus", json!(config.cpus.max().get()));
    default(cpus, "max_phys_bits", json!(46));
    default(
        section(vm, "memory"),
        "size",
        json!(config.memory.size.bytes()),
    );
    let memory = section(vm, "memory");
    if memory.get("hotplug_size").is_some_and(Value::is_number) || config.memory.hotplug_size.0 > 0
    {
        // It may be less than the client asked for, and Kata's Go client takes it for the limit.
        memory.insert("hotplug_size".into(), config.memory.hotplug_size.0.into());
    }
    default(section(vm, "rng"), "src", json!("/dev/urandom"));
    default(section(vm, "serial"), "mode", mode(&config.serial));
    default(section(vm, "console"), "mode", mode(&config.console));
    let nets = vm.get_mut("net").and_then(Value::as_array_mut);
    for (net, config) in nets.into_iter().flatten().zip(&config.nets) {
        if let Value::Object(net) = net {
            default(net, "ip", json!("192.168.249.1"));
            default(net, "mask", json!("255.255.255.0"));
            default(net, "mac", json!(config.mac.to_string()));
            default(net, "num_queues", json!(2 * config.pairs));
            default(net, "queue_size", json!(config.queue_size));
        }
    }
    let shares = vm.get_mut("fs").and_then(Value::as_array_mut);
    for (share, config) in shares.into_iter().flatten().zip(&config.shares) {
        if let Value::Object(share) = share {
            default(share, "num_queues", json!(config.queues));
            default(share, "queue_size", json!(config.queue_size));
        }
    }
    let disks = vm.get_mut("disks").and_then(Value::as_array_mut);
    let queues = config
        .disks
        .iter()
        .map(|disk| (disk.queues, disk.queue_size));
    for (disk, (queues, size)) in disks.into_iter().flatten().zip(queues) {
        if let Value::Object(disk) = disk {
            default(disk, "num_queues", json!(queues));
            default(disk, "queue_size", json!(size));
            default(disk, "image_type", json!("Raw"));
        }
    }
}

/// The sizes that change in a VM's life, which `config` alone knows.
fn write_sizes(vm: &mut Map<String, Value>, config: &VmConfig) {
    let VmConfig {
        cpus,
        memory,
        balloon,
        ..
    } = config;
    section(vm, "cpus").insert("boot_vcpus".into(), json!(cpus.boot().get()));
    if memory.hotplug_size.0 > 0 {
        let plugged = json!(memory.hotplugged_size.0);
        section(vm, "memory").insert("hotplugged_size".into(), plugged);
    }
    if let Some(balloon) = balloon {
        section(vm, "balloon").insert("size".into(), json!(balloon.size.0));
    }
}

/// The object at `key`, made if it is missing or null.
fn section<'a>(vm: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    let value = vm.entry(key).or_insert(Value::Null);
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("just made one")
}

fn default(object: &mut Map<String, Value>, key: &str, value: Value) {
    if object.get(key).is_none_or(Value::is_null) {
        object.insert(key.into(), value);
    }
}

fn mode(output: &Output) -> Value {
    Value::from(match output {
        Output::Off => "Off",
        Output::Null => "Null",
        Output::Tty => "Tty",
        Output::File(_) => "File",
        Output::Socket(_) => "Socket",
    })
}

#[cfg(test)]
mod tests;
