// SPDX-License-Identifier: GPL-2.0-or-later
/* /dev/kernweave: sessions, request checking, dispatch. */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/security.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

#include "kw.h"

DEFINE_MUTEX(kw_lock);
struct workqueue_struct *kw_works;
static struct kw_session *kw_writer; /* under kw_lock */

/*
 * For what may be large, freed by kvfree(): fails where the kernel would end processes, and
 * looks for no pages in a row.
 */
void *kw_alloc(size_t bytes, gfp_t zero)
{
	if (bytes <= PAGE_SIZE)
		return kmalloc(max_t(size_t, bytes, 8), GFP_KERNEL | zero);
	return __vmalloc(bytes, GFP_KERNEL | __GFP_RETRY_MAYFAIL | __GFP_NOWARN | zero);
}

/*
 * Room for a reply payload; once per request.  NULL: the caller's buffer is too small, or
 * there is no memory.
 */
void *kw_reserve(struct kw_out *out, size_t bytes)
{
	if (bytes > out->cap || out->buf)
		return NULL;
	out->buf = kw_alloc(bytes, __GFP_ZERO);
	out->nomem = !out->buf;
	if (out->buf)
		out->len = bytes;
	return out->buf;
}

static int kw_hello(struct kw_session *s, const struct kw_hello *req, struct kw_out *out)
{
	struct kw_hello *owner;

	if (s->greeted || req->flags & ~KW_WRITER)
		return -EINVAL;
	if (req->flags & KW_WRITER && kw_writer) {
		owner = kw_reserve(out, sizeof(*owner));
		if (owner)
			*owner = kw_writer->who;
		return -EBUSY;
	}
	s->who = *req;
	s->who.name[sizeof(s->who.name) - 1] = 0;
	s->greeted = true;
	if (req->flags & KW_WRITER) {
		s->writer = true;
		kw_writer = s;
	}
	return kw_facts(out);
}

/* The smallest payload of each request; a request that needs a writer changes something. */
static const struct kw_rule {
	u16 min;
	bool writes;
} kw_rules[] = {
	[KW_OP_HELLO] = { sizeof(struct kw_hello), false },
	[KW_OP_LOOKUP] = { 1, false },
	[KW_OP_READ] = { sizeof(struct kw_range), false },
	[KW_OP_KMODS] = { 0, false },
	[KW_OP_DENYLIST] = { 0, false },
	[KW_OP_KPROBES] = { 0, false },
	[KW_OP_FTRACE] = { 0, false },
	[KW_OP_PLACED] = { 0, false },
	[KW_OP_AREA] = { sizeof(struct kw_size), true },
	[KW_OP_PERCPU] = { sizeof(struct kw_slice), true },
	[KW_OP_WRITE] = { sizeof(struct kw_slice), true },
	[KW_OP_SEAL] = { sizeof(struct kw_slice), true },
	[KW_OP_COMMIT] = { sizeof(struct kw_commit), true },
	[KW_OP_UNDO] = { sizeof(struct kw_size), true },
	[KW_OP_STATES] = { sizeof(struct kw_size), true },
	[KW_OP_QUIESCE] = { 0, true },
	[KW_OP_COUNTERS] = { sizeof(struct kw_slice), true },
	[KW_OP_FREE] = { sizeof(struct kw_slice), true },
	[KW_OP_FORGET] = { sizeof(struct kw_size), true },
	[KW_OP_ARM] = { sizeof(struct kw_commit), true },
	[KW_OP_DISARM] = { sizeof(struct kw_size), true },
	[KW_OP_COPIES] = { sizeof(struct kw_slice), true },
	[KW_OP_RETURNS] = { 0, false },
	[KW_OP_WEAVE] = { sizeof(struct kw_weave), true },
	[KW_OP_MOVE] = { sizeof(struct kw_slice), true },
	[KW_OP_CLOSED] = { sizeof(struct kw_slice), true },
};

/* Requests that change something; kw_lock held. */
static int kw_change(struct kw_session *s, u16 op, const u8 *p, size_t len, struct kw_out *out)
{
	const size_t slice = sizeof(struct kw_slice), commit = sizeof(struct kw_commit);
	const size_t weave = sizeof(struct kw_weave);

	switch (op) {
	case KW_OP_AREA:
		return kw_area_alloc(s, (void *)p, out);
	case KW_OP_PERCPU:
		return kw_area_percpu(s, (void *)p, out);
	case KW_OP_WRITE:
		return kw_area_write(s, (void *)p, p + slice, len - slice);
	case KW_OP_SEAL:
		return kw_area_seal(s, (void *)p);
	case KW_OP_COMMIT:
		return kw_text_commit(s, (void *)p, (void *)(p + commit), len - commit, out);
	case KW_OP_UNDO:
		return kw_undo(s, (void *)p, out);
	case KW_OP_STATES:
		return kw_text_states(s, (void *)p, out);
	case KW_OP_COUNTERS:
		return kw_area_counters(s, (void *)p, out);
	case KW_OP_FREE:
		return kw_area_free(s, (void *)p, out);
	case KW_OP_FORGET:
		return kw_forget(s, (void *)p);
	case KW_OP_ARM:
		return kw_trap_arm(s, (void *)p, (void *)(p + commit), len - commit, out);
	case KW_OP_DISARM:
		return kw_trap_disarm(s, (void *)p, out);
	case KW_OP_COPIES:
		return kw_copies_set(s, (void *)p, (void *)(p + slice), len - slice);
	case KW_OP_WEAVE:
		return kw_weave(s, (void *)p, p + weave, len - weave);
	case KW_OP_MOVE:
		return kw_weave_move(s, (void *)p, out);
	case KW_OP_CLOSED:
		return kw_weave_closed(s, (void *)p, out);
	}
	return -EOPNOTSUPP;
}

/* Requests that only look; kw_lock held. */
static int kw_look(struct kw_session *s, u16 op, const u8 *p, size_t len, struct kw_out *out)
{
	switch (op) {
	case KW_OP_HELLO:
		return kw_hello(s, (void *)p, out);
	case KW_OP_LOOKUP:
		return kw_lookup(p, len, out);
	case KW_OP_READ:
		return kw_read(p, len, out);
	case KW_OP_KMODS:
		return kw_kmods(out);
	case KW_OP_DENYLIST:
		return kw_denylist(out);
	case KW_OP_KPROBES:
		return kw_kprobes(out);
	case KW_OP_FTRACE:
		return kw_ftrace_records(out);
	case KW_OP_PLACED:
		return kw_placed(out);
	case KW_OP_RETURNS:
		return kw_copies_returns(out);
	}
	return -EOPNOTSUPP;
}

static int kw_dispatch(struct kw_session *s, const struct kw_req *r, struct kw_out *out)
{
	const u8 *payload = (const u8 *)(r + 1);
	const struct kw_rule *rule;
	int ret;

	if (r->version != KW_UAPI_VERSION)
		return -EPROTO;
	if (!r->op || r->op >= ARRAY_SIZE(kw_rules))
		return -EOPNOTSUPP;
	rule = &kw_rules[r->op];
	if (r->len < rule->min)
		return -EINVAL;
	if (r->op != KW_OP_HELLO && !s->greeted)
		return -ENOTCONN;
	if (rule->writes && !s->writer)
		return -EPERM;
	if (r->op == KW_OP_QUIESCE) {
		kw_quiesce();
		return 0;
	}
	if (r->op == KW_OP_HELLO)
		kw_undo_settle();
	mutex_lock(&kw_lock);
	ret = rule->writes ? kw_change(s, r->op, payload, r->len, out) :
			     kw_look(s, r->op, payload, r->len, out);
	mutex_unlock(&kw_lock);
	return ret;
}

static int kw_reply(struct kw_call *call, const struct kw_req *r, int status, struct kw_out *out)
{
	void __user *to = u64_to_user_ptr(call->rep);
	struct kw_rep rep = {
		.magic = KW_MAGIC,
		.version = KW_UAPI_VERSION,
		.op = r->op,
		.status = status,
		.detail = out->detail,
		.len = out->len,
	};

	call->rep_len = sizeof(rep) + out->len;
	if (copy_to_user(to, &rep, sizeof(rep)))
		return -EFAULT;
	if (out->len && copy_to_user(to + sizeof(rep), out->buf, out->len))
		return -EFAULT;
	return 0;
}

static int kw_call(struct kw_session *s, struct kw_call *call)
{
	struct kw_out out = {};
	struct kw_req *r;
	int ret;

	if (call->req_len < sizeof(*r) || call->req_len > KW_MAX_REQUEST)
		return -EMSGSIZE;
	if (call->rep_cap < sizeof(struct kw_rep))
		return -EMSGSIZE;
	out.cap = min_t(u64, call->rep_cap, KW_MAX_REPLY) - sizeof(struct kw_rep);
	r = kw_alloc(call->req_len, 0);
	if (!r)
		return -ENOMEM;
	if (copy_from_user(r, u64_to_user_ptr(call->req), call->req_len)) {
		ret = -EFAULT;
	} else if (r->magic != KW_MAGIC || r->len != call->req_len - sizeof(*r)) {
		ret = -EBADMSG;
	} else {
		ret = kw_dispatch(s, r, &out);
		if (ret == -ENOSPC && out.nomem)
			ret = -ENOMEM;
		if (ret != -EINTR) /* nothing is done: the caller decides whether it asks again */
			ret = kw_reply(call, r, ret, &out);
	}
	kvfree(out.buf);
	kvfree(r);
	return ret;
}

static long kw_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct kw_session *s = file->private_data;
	struct kw_call call;
	long ret;

	if (cmd != KW_IOC_CALL)
		return -ENOTTY;
	if (copy_from_user(&call, (void __user *)arg, sizeof(call)))
		return -EFAULT;
	mutex_lock(&s->lock);
	ret = kw_call(s, &call);
	mutex_unlock(&s->lock);
	if (!ret && copy_to_user((void __user *)arg, &call, sizeof(call)))
		ret = -EFAULT;
	return ret;
}

static int kw_open(struct inode *inode, struct file *file)
{
	struct kw_session *s;

	if (!capable(CAP_SYS_ADMIN) || security_locked_down(LOCKDOWN_DEV_MEM))
		return -EPERM;
	s = kzalloc(sizeof(*s), GFP_KERNEL);
	if (!s)
		return -ENOMEM;
	mutex_init(&s->lock);
	INIT_LIST_HEAD(&s->areas);
	INIT_LIST_HEAD(&s->txns);
	INIT_LIST_HEAD(&s->sets);
	file->private_data = s;
	return 0;
}

/* Undoes everything the session did, however it ended. */
static int kw_release(struct inode *inode, struct file *file)
{
	struct kw_session *s = file->private_data;

	mutex_lock(&kw_lock);
	kw_trap_session(s);
	kw_undo_session(s);
	if (kw_writer == s)
		kw_writer = NULL;
	mutex_unlock(&kw_lock);
	kfree(s);
	return 0;
}

static const struct file_operations kw_fops = {
	.owner = THIS_MODULE,
	.open = kw_open,
	.release = kw_release,
	.unlocked_ioctl = kw_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice kw_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "kernweave",
	.fops = &kw_fops,
	.mode = 0600,
};

static int __init kw_begin(void)
{
	int ret = kw_resolve();

	if (ret)
		return ret;
	kw_works = alloc_workqueue(KBUILD_MODNAME, WQ_UNBOUND, 0);
	if (!kw_works)
		return -ENOMEM;
	ret = kw_group_init();
	if (ret)
		goto out_works;
	ret = kw_going_init();
	if (ret)
		goto out_group;
	ret = misc_register(&kw_device);
	if (ret)
		goto out_going;
	return 0;

out_going:
	kw_going_exit();
out_group:
	kw_group_exit();
out_works:
	destroy_workqueue(kw_works);
	return ret;
}

static int __init kw_init(void)
{
	int ret = kw_begin();

	if (ret && kw_syms.module_mutex)
		kw_unlist(THIS_MODULE);
	return ret;
}

/* No session is open here: an open descriptor holds the kmod. */
static void __exit kw_exit(void)
{
	misc_deregister(&kw_device);
	kw_traps_exit();
	kw_undo_exit();
	kw_areas_exit();
	kw_weave_exit();
	kw_going_exit();
	kw_group_exit();
	destroy_workqueue(kw_works);
	kw_unlist(THIS_MODULE);
}

module_init(kw_init);
module_exit(kw_exit);
MODULE_DESCRIPTION("kernweave: change the code of a running kernel, and put it back");
MODULE_LICENSE("GPL");
