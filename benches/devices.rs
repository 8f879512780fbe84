//! What the device model spends on a request: a driver on mock queues, no KVM
//! and no thread.

use std::os::unix::net::UnixDatagram;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use devices::virtio::Limits;
use devices::virtio::blk::{Blk, BlkConfig};
use devices::virtio::fs::{Cache, Fs, FsConfig};
use devices::virtio::net::{Net, NetConfig, Offloads, Tap};
use devices::virtio::rng::Rng;
use devices::virtio::testing::{Buffer, Guest};

const BLOCK: u32 = 4096;

fn rng(criterion: &mut Criterion) {
    let mut guest = Guest::live(Rng::new());
    criterion.bench_function("rng/64 bytes", |bencher| {
        bencher.iter(|| guest.request(0, &[Buffer::In(64)]));
    });
}

fn blk(criterion: &mut Criterion) {
    let image = tempfile::NamedTempFile::new().expect("there is a temporary folder");
    image.as_file().set_len(1 << 20).expect("and room in it");
    let blk = Blk::open(BlkConfig {
        path: image.path().into(),
        readonly: false,
        direct: false,
        queues: 1,
        queue_size: 128,
        serial: "bench".into(),
        rates: Limits::default(),
        name: "blk0".into(),
    });
    let mut guest = Guest::live(blk.expect("the image can be opened"));
    let header = |kind: u32| [&kind.to_le_bytes()[..], &[0; 12]].concat();

    let mut group = criterion.benchmark_group("blk");
    group.throughput(Throughput::Bytes(BLOCK.into()));
    group.bench_function("read 4 KiB", |bencher| {
        let request = [Buffer::Out(header(0)), Buffer::In(BLOCK), Buffer::In(1)];
        bencher.iter(|| guest.request(0, &request));
    });
    group.bench_function("write 4 KiB", |bencher| {
        let data = vec![7; BLOCK as usize];
        let request = [Buffer::Out(header(1)), Buffer::Out(data), Buffer::In(1)];
        bencher.iter(|| guest.request(0, &request));
    });
    group.finish();
}

/// The kernel's side of virtio-fs, as far as a request's header goes (FUSE 7.38).
fn request(opcode: u32, nodeid: u64, body: &[u8]) -> Buffer {
    let len = u32::try_from(40 + body.len()).expect("requests are short");
    let mut bytes = [len.to_le_bytes(), opcode.to_le_bytes()].concat();
    bytes.extend_from_slice(&1_u64.to_le_bytes());
    bytes.extend_from_slice(&nodeid.to_le_bytes());
    bytes.resize(40, 0);
    bytes.extend_from_slice(body);
    Buffer::Out(bytes)
}

fn word(answer: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(answer[at..at + 8].try_into().expect("eight bytes"))
}

fn fs(criterion: &mut Criterion) {
    const LOOKUP: u32 = 1;
    const GETATTR: u32 = 3;
    const OPEN: u32 = 14;
    const READ: u32 = 15;
    const WRITE: u32 = 16;
    let folder = tempfile::TempDir::new().expect("there is a temporary folder");
    std::fs::write(folder.path().join("f"), vec![7; 1 << 20]).expect("and room in it");
    let share = Fs::new(FsConfig {
        tag: "bench".into(),
        folder: folder.path().into(),
        readonly: false,
        cache: Cache::Auto,
        writeback: false,
        queues: 1,
        queue_size: 128,
        descriptors: 1000,
        rates: Limits::default(),
        name: "fs0".into(),
    });
    let mut guest = Guest::live(share.expect("the folder can be shared"));
    let mut ask = |buffers: &[Buffer]| guest.request(1, buffers).expect("there is room");
    let entry = ask(&[request(LOOKUP, 1, b"f\0"), Buffer::In(200)]);
    let node = word(&entry, 16);
    let open = ask(&[request(OPEN, node, &2_u64.to_le_bytes()), Buffer::In(200)]);
    let fh = word(&open, 16);
    // fh, offset, size, flags, lock owner.
    let place = [fh, 0, BLOCK.into(), 0, 0].map(u64::to_le_bytes).concat();

    let mut group = criterion.benchmark_group("fs");
    group.bench_function("lookup", |bencher| {
        bencher.iter(|| ask(&[request(LOOKUP, 1, b"f\0"), Buffer::In(200)]));
    });
    group.bench_function("stat", |bencher| {
        bencher.iter(|| ask(&[request(GETATTR, node, &[0; 16]), Buffer::In(200)]));
    });
    group.throughput(Throughput::Bytes(BLOCK.into()));
    group.bench_function("read 4 KiB", |bencher| {
        let buffers = [
            request(READ, node, &place),
            Buffer::In(16),
            Buffer::In(BLOCK),
        ];
        bencher.iter(|| ask(&buffers));
    });
    group.bench_function("write 4 KiB", |bencher| {
        let data = Buffer::Out(vec![7; BLOCK as usize]);
        let mut header = request(WRITE, node, &place);
        if let Buffer::Out(bytes) = &mut header {
            bytes[..4].copy_from_slice(&(80 + BLOCK).to_le_bytes());
        }
        let buffers = [header, data, Buffer::In(24)];
        bencher.iter(|| ask(&buffers));
    });
    group.finish();
}

fn net(criterion: &mut Criterion) {
    const HEADER: usize = 12;
    let (tap, host) = UnixDatagram::pair().expect("sockets are possible");
    tap.set_nonblocking(true).expect("and need not block");
    let net = Net::new(NetConfig {
        taps: vec![Tap::pretend(tap.into())],
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        queue_size: 256,
        offloads: Offloads::default(),
        rates: Limits::default(),
    });
    let mut guest = Guest::live(net.expect("the tap will do"));
    let frame = vec![0; HEADER + 1500];
    let mut room = [0; 2000];
    let mut group = criterion.benchmark_group("net");
    group.throughput(Throughput::Bytes(1500));
    group.bench_function("transmit 1500 bytes", |bencher| {
        let out = [Buffer::Out(frame.clone())];
        bencher.iter(|| {
            guest.request(1, &out).expect("there is room");
            host.recv(&mut room).expect("it was sent")
        });
    });
    group.bench_function("receive 1500 bytes", |bencher| {
        bencher.iter(|| {
            // Beyond what offloads may make of a frame, so that it is taken.
            while guest.in_flight(0) < 5 {
                guest
                    .add(0, &[Buffer::In(16 << 10)])
                    .expect("there is room");
            }
            guest.kick(0);
            host.send(&frame).expect("it is taken");
            guest.settle();
            guest.take(0).expect("it was received")
        });
    });
    group.finish();
}

criterion_group!(benches, rng, blk, fs, net);
criterion_main!(benches);
