// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Kmods of ours that go.  Each warning prints the kernel's list of kmods, and
 * print_modules() looks whether one is being freed before module_flags() does so
 * again, and has a BUG there: who frees one in between brings the machine down.
 * So ours leave the list, and nobody prints them any more, before they are freed.
 */
#include <linux/notifier.h>
#include <linux/rculist.h>

#include "kw.h"

#define KW_GENERATION KBUILD_MODNAME "_"

/*
 * May sleep.  Nobody finds it by name afterwards; by an address, until it is freed.  Who
 * loads another of that name meanwhile fails, for there is one in sysfs.
 */
void kw_unlist(struct module *mod)
{
	mutex_lock(kw_syms.module_mutex);
	list_del_rcu(&mod->list);
	mutex_unlock(kw_syms.module_mutex);
	synchronize_rcu();
	INIT_LIST_HEAD(&mod->list); /* the kernel takes it off again */
}

static int kw_going(struct notifier_block *nb, unsigned long state, void *data)
{
	struct module *mod = data;

	if (state == MODULE_STATE_GOING && strstarts(mod->name, KW_GENERATION))
		kw_unlist(mod);
	return NOTIFY_DONE;
}

static struct notifier_block kw_going_notifier = { .notifier_call = kw_going };

int kw_going_init(void)
{
	return register_module_notifier(&kw_going_notifier);
}

void kw_going_exit(void)
{
	unregister_module_notifier(&kw_going_notifier);
}
