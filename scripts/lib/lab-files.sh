# shellcheck shell=bash
# What the emulated host is made of: a distribution's kernel, an initramfs with a small userland, a disk.
# Sourced by scripts/lab, after common.sh. Everything here works without root.
# shellcheck source=common.sh disable=SC2154

# Where the kernel and busybox are kept, for all labs of this user.
downloads=${XDG_CACHE_HOME:-$HOME/.cache}/catnap-lab/packages
! bundled || downloads=$root/lab

# What the host needs beyond its kernel. One that is not there is built in, as some are in Ubuntu's.
modules="kvm-amd virtio_pci virtio_blk virtio_net tun"

# Host programs that people and tests want inside. The last ones only when they are there.
programs="qemu-img mke2fs e2fsck"
programs_wanted="curl strace"

# Downloads and unpacks the kernel and busybox, unless that has been done. Two labs may begin at once.
fetch_packages() {
    [ -e "$downloads/complete" ] && return
    command -v apt-get >/dev/null ||
        die 5 "the lab takes its kernel from Debian's or Ubuntu's packages, and apt-get is missing"
    mkdir -p "${downloads%/*}"
    (
        flock 8
        [ -e "$downloads/complete" ] || { download && unpack; }
    ) 8>"$downloads.lock" || die 5 "the lab's packages could not be fetched
try: sudo apt-get update, and look at what apt-get says above"
}

# Leaves the packages in packages.new. Lists of packages may be missing or stale, hence the second try.
download() {
    rm -rf "$downloads.new"
    mkdir -p "$downloads.new"
    download_once || { as_root apt-get update -qq >&2 && download_once; }
}

download_once() {
    local image names
    image=$(kernel_package) || return
    names=("$image" busybox-static)
    # Ubuntu keeps the modules in a package of their own.
    if [[ $image = *-generic ]]; then names+=("${image/image/modules}"); fi
    say "fetching ${names[*]}"
    # apt warns that it works as root in a folder of this user; it does that well.
    (cd "$downloads.new" && apt-get download -qq "${names[@]}" 2> >(grep -v unsandboxed >&2))
}

# Each step only after the one before: a half unpacked kernel must not look complete.
unpack() {
    (
        cd "$downloads.new" &&
            for package in ./*.deb; do dpkg -x "$package" tree || exit; done &&
            # Where a distribution keeps everything in /usr, this makes the two layouts one.
            { [ -d tree/lib ] || ln -s usr/lib tree/lib; } &&
            # Newer kernels come with compressed modules, which insmod of busybox does not read.
            find tree -name '*.ko.xz' -exec xz -d {} + &&
            find tree -name '*.ko.zst' -exec zstd -q -d --rm {} + &&
            mv "$(find tree -path '*bin/busybox')" busybox &&
            mv tree/boot/vmlinuz-* vmlinuz &&
            ./busybox depmod -b tree "$(ls tree/lib/modules)" &&
            rm ./*.deb &&
            touch complete
    ) && rm -rf "$downloads" && mv "$downloads.new" "$downloads"
}

# The package that the distribution's name for its smallest kernel stands for today.
kernel_package() {
    local name
    for name in linux-image-cloud-amd64 linux-image-virtual; do
        apt-cache depends "$name" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | grep . && return
    done
    return 1
}

# make_initramfs AGENT OUT: the whole userland of the host, as an archive that the kernel unpacks into RAM.
# Not compressed: unpacking costs more under emulation than reading does.
make_initramfs() {
    local agent=$1 out=$2 tree name
    tree=$(mktemp -d "$out.XXXXXX")
    chmod 755 "$tree"
    mkdir -p "$tree"/{bin,sbin,etc,lib/modules,proc,sys,dev,tmp,run,root,usr/bin,usr/sbin,lab}
    cp "$downloads/busybox" "$tree/bin/"
    for name in $("$downloads/busybox" --list); do
        [ "$name" = busybox ] || ln -s /bin/busybox "$tree/bin/$name"
    done
    ln -s bin/busybox "$tree/init"
    cp -r "$root"/scripts/lib/lab-root/. "$tree/"
    cp "$agent" "$tree/bin/catnap-guest"
    copy_modules "$tree/lib/modules"
    for name in $programs; do copy_program "$name" "$tree"; done
    for name in $programs_wanted; do command -v "$name" >/dev/null && copy_program "$name" "$tree"; done
    # cpio tells how much it wrote, which nobody wants to know unless it failed.
    (cd "$tree" && find . | "$downloads/busybox" cpio -o -H newc -R 0:0) >"$out" 2>"$out.log" ||
        die 1 "the lab's initramfs cannot be made: $(cat "$out.log")"
    rm -rf "$tree"
}

# Copies the modules, with numbers in front that give the order in which to load them: modules.dep names
# what a module needs, what must come first last.
copy_modules() {
    local folder number=10 name module
    folder=$(echo "$downloads"/tree/lib/modules/*)
    for module in $(
        for name in $modules; do
            grep -m 1 "/$name.ko:" "$folder/modules.dep" | tr -d : | xargs -n 1 | tac
        done | awk '!seen[$0]++'
    ); do
        cp "$folder/$module" "$1/$((number++))-${module##*/}"
    done
}

# Copies a program and the libraries that it is linked with to where the dynamic loader looks for them.
copy_program() {
    local program file
    program=$(command -v "$1")
    rm -f "$2/bin/$1"
    for file in "$program" $(ldd "$program" | grep -o '/[^ ]*'); do
        mkdir -p "$2${file%/*}"
        [ -e "$2$file" ] || cp -L "$file" "$2$file"
    done
}

# make_disk FILE: an empty filesystem that grows as it is filled.
make_disk() {
    truncate -s 16G "$1.new"
    mke2fs -q -t ext4 -L lab -m 0 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard "$1.new"
    mv "$1.new" "$1"
}
