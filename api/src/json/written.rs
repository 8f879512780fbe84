//! A VM that was not defined in JSON, written as if it had been: all that makes a difference.

use serde_json::{Map, Value, json};

use crate::config::{
    BalloonConfig, DiskConfig, FsCache, FsConfig, FsSource, NetConfig, Output, RateLimit,
    RateLimits, TapSource, VmConfig,
};

pub(super) fn vm(config: &VmConfig) -> Map<String, Value> {
    let mut vm = Map::new();
    let kernel = &config.kernel;
    let payload = json!({
        "kernel": kernel.path,
        "initramfs": kernel.initramfs,
        "cmdline": kernel.cmdline,
    });
    vm.insert("payload".into(), payload);
    let memory = &config.memory;
    let memory = json!({
        "size": memory.size.bytes(),
        "hugepages": memory.hugepages,
        "thp": memory.thp,
        "shared": memory.shared,
    });
    vm.insert("memory".into(), memory);
    vm.insert("disks".into(), config.disks.iter().map(disk).collect());
    vm.insert("net".into(), config.nets.iter().map(net).collect());
    vm.insert("fs".into(), config.shares.iter().map(share).collect());
    if let Some(vsock) = &config.vsock {
        let vsock = json!({"cid": vsock.cid, "socket": vsock.socket});
        vm.insert("vsock".into(), vsock);
    }
    if let Some(balloon) = &config.balloon {
        vm.insert("balloon".into(), self::balloon(balloon));
    }
    vm.insert("serial".into(), output(&config.serial));
    vm.insert("console".into(), output(&config.console));
    vm
}

fn disk(disk: &DiskConfig) -> Value {
    json!({
        "path": disk.path,
        "readonly": disk.readonly,
        "direct": disk.direct,
        "serial": disk.id,
        "rate_limiter_config": rates(&disk.rates),
    })
}

/// Descriptors mean nothing to whoever reads this.
fn net(net: &NetConfig) -> Value {
    let tap = match &net.tap {
        TapSource::Name(name) => Some(name),
        TapSource::Numbers(_) | TapSource::Passed(_) => None,
    };
    json!({
        "tap": tap,
        "mtu": net.mtu,
        "offload_tso": net.offload_tso,
        "offload_ufo": net.offload_ufo,
        "offload_csum": net.offload_csum,
        "rate_limiter_config": rates(&net.rates),
    })
}

fn share(share: &FsConfig) -> Value {
    match &share.source {
        FsSource::Folder(folder) => json!({
            "tag": share.tag,
            "shared_dir": folder.path,
            "readonly": folder.readonly,
            "writeback": folder.writeback,
            "cache": match folder.cache {
                FsCache::None => "none",
                FsCache::Auto => "auto",
                FsCache::Always => "always",
            },
        }),
        FsSource::Socket(socket) => json!({"tag": share.tag, "socket": socket}),
    }
}

fn balloon(balloon: &BalloonConfig) -> Value {
    json!({
        "size": balloon.size.0,
        "deflate_on_oom": balloon.deflate_on_oom,
        "free_page_reporting": balloon.free_page_reporting,
    })
}

fn output(output: &Output) -> Value {
    match output {
        Output::File(file) => json!({"mode": "File", "file": file}),
        Output::Socket(socket) => json!({"mode": "Socket", "socket": socket}),
        other => json!({ "mode": super::mode(other) }),
    }
}

fn rates(rates: &RateLimits) -> Value {
    let rate = |rate: &RateLimit| {
        json!({
            "size": rate.size,
            "one_time_burst": rate.one_time_burst,
            "refill_time": rate.refill_time_ms,
        })
    };
    match (&rates.bandwidth, &rates.operations) {
        (None, None) => Value::Null,
        (bandwidth, operations) => json!({
            "bandwidth": bandwidth.as_ref().map(rate),
            "ops": operations.as_ref().map(rate),
        }),
    }
}
